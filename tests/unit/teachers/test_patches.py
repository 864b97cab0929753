"""Teacher `patches` against a plain loop over tokens, channels and pixels."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import ModelError
from foveate.teachers.patches import PatchOptions, PatchTeacher, signed, to_maps, to_rows, unit
from foveate.types import Grid
from tests.unit.teachers.conftest import built, context, inputs, pixels_of


def by_hand(picture: Image.Image, grid: Grid, side: int) -> Tensor:
    """`[N, 3*side*side]` in -1…1."""
    pixels = pixels_of(picture, grid[0] * side, grid[1] * side)
    rows = []
    for down in range(grid[0]):
        for across in range(grid[1]):
            row = []
            for channel in range(3):
                for y in range(side):
                    for x in range(side):
                        row.append(float(pixels[channel, down * side + y, across * side + x]) / 255 * 2 - 1)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("grid", "side"), [((3, 3), 4), ((2, 5), 6), ((4, 1), 1)])
def test_rows_are_the_pixels_of_each_patch(photos: list[Image.Image], grid: Grid, side: int) -> None:
    options = PatchOptions(patch_px=side)
    teacher, given = built(PatchTeacher, options, context(grid)), inputs(PatchTeacher, options, photos, grid)
    found = teacher.encode(given)
    spec = PatchTeacher.describe(options, context(grid))
    assert [tuple(views["pixels"].shape[1:]) for views in given.prepared] == [spec.image_size] * 2
    assert all(views["pixels"].dtype is torch.uint8 for views in given.prepared)
    assert (spec.width, spec.grid) == (3 * side * side, grid)
    for record, picture in zip(found, photos, strict=True):
        assert record["patches"].shape == (grid[0] * grid[1], spec.width)
        torch.testing.assert_close(record["patches"].double(), by_hand(picture, grid, side), atol=1e-6, rtol=0)


def test_decode_gives_the_picture_back(photos: list[Image.Image]) -> None:
    grid, options = (2, 3), PatchOptions(patch_px=5)
    teacher, given = built(PatchTeacher, options, context(grid)), inputs(PatchTeacher, options, photos, grid)
    rows = torch.stack([record["patches"] for record in teacher.encode(given)])
    wanted = torch.stack([pixels_of(picture, 10, 15) for picture in photos]) / 255
    torch.testing.assert_close(teacher.decode(rows).double(), wanted, atol=1e-6, rtol=0)


def test_normalized_patches_have_mean_0_and_variance_1_and_flat_ones_are_finite(photos: list[Image.Image]) -> None:
    grid, options = (3, 2), PatchOptions(patch_px=8, normalize=True)
    teacher = built(PatchTeacher, options, context(grid))
    real, flat = teacher.encode(inputs(PatchTeacher, options, [photos[0], Image.new("RGB", (40, 40), "teal")], grid))
    plain = by_hand(photos[0], grid, 8)
    wanted = (plain - plain.mean(1, keepdim=True)) / plain.std(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(real["patches"].double(), wanted, atol=1e-4, rtol=1e-4)
    grey = teacher.encode(inputs(PatchTeacher, options, [Image.new("RGB", (9, 9), (77, 77, 77))], grid))[0]
    assert flat["patches"].isfinite().all()
    assert grey["patches"].abs().max() == 0
    with pytest.raises(ModelError, match="normalize"):
        teacher.decode(real["patches"][None])


def test_rows_and_maps_are_inverse_for_random_values() -> None:
    rows = torch.randn(2, 6, 5 * 9)
    maps = to_maps(rows, (2, 3), 3)
    assert maps.shape == (2, 5, 6, 9)
    assert torch.equal(to_rows(maps, 3), rows)
    assert maps[1, 4, 2, 5] == rows[1, 1, 4 * 9 + 2 * 3 + 2]


def test_pixels_shown_lie_in_0_to_1_and_keep_their_gradient() -> None:
    values = (torch.randn(500) * 3).requires_grad_()
    shown = unit(values)
    assert shown.min() == 0 and shown.max() == 1
    torch.testing.assert_close(shown, ((values + 1) / 2).clamp(0, 1))
    shown.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.full((500,), 0.5))


def test_pixels_are_exact_in_every_number_format() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    wanted = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 2**-9)):
        found = signed(every, dtype)
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)
