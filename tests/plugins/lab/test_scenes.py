"""Scenes: real scans, disjoint between the splits, pure functions of their keys."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits

from foveate_lab.scenes import BACKGROUND, COMPASS, PALETTE, SceneOptions, draw, make_scene, place_names, split_scans


def test_splits_share_no_scan_and_together_hold_every_one() -> None:
    train, test = set(split_scans("train")), set(split_scans("test"))
    assert not train & test
    assert train | test == set(range(1797))
    labels = load_digits().target
    per_class = np.bincount(labels[sorted(test)], minlength=10)
    assert per_class.min() >= 30


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_draw_only_the_scans_of_their_split_and_tell_their_class(split: str) -> None:
    allowed, labels = set(split_scans(split)), load_digits().target
    cells = [cell for index in range(300) for cell in make_scene(SceneOptions(), split, index).cells]
    assert {cell.scan for cell in cells} <= allowed
    assert all(labels[cell.scan] == cell.digit for cell in cells)
    assert {cell.digit for cell in cells} == set(range(10))
    assert {cell.colour for cell in cells} == set(PALETTE)


def test_a_scene_is_a_pure_function_of_options_split_index_and_seed() -> None:
    options = SceneOptions()
    scene = make_scene(options, "train", 7, seed=3)
    for other in (5, 6, 8):
        make_scene(options, "train", other, seed=3)
    again = make_scene(options, "train", 7, seed=3)
    assert again == scene
    assert np.array_equal(draw(again), draw(scene))
    others = [("train", 8, 3), ("train", 7, 4), ("test", 7, 3)]
    assert all(make_scene(options, *key).cells != scene.cells for key in others)


def test_another_process_draws_the_same_pixels() -> None:
    code = (
        "import zlib; from foveate_lab.scenes import *; "
        "print(zlib.crc32(draw(make_scene(SceneOptions(), 'test', 11, 5)).tobytes()))"
    )
    import zlib

    here = zlib.crc32(draw(make_scene(SceneOptions(), "test", 11, 5)).tobytes())
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == here


def test_a_picture_shows_its_cells_in_their_places_and_colours() -> None:
    options = SceneOptions(noise=0, density=0.5)
    for index in range(20):
        scene = make_scene(options, "train", index)
        pixels = draw(scene)
        assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8
        filled = {(cell.row, cell.column): cell for cell in scene.cells}
        for row in range(3):
            for column in range(3):
                patch = pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].reshape(-1, 3).astype(int)
                if (row, column) not in filled:
                    assert (patch == BACKGROUND).all()
                    continue
                strongest = patch[np.abs(patch - BACKGROUND).sum(1).argmax()]
                distance = {name: np.abs(strongest - colour).sum() for name, colour in PALETTE.items()}
                assert min(distance, key=distance.__getitem__) == filled[row, column].colour


def test_a_drawn_digit_is_its_scan_enlarged() -> None:
    scans = load_digits().images
    scene = make_scene(SceneOptions(noise=0, colours=("white",), density=1.0), "train", 0)
    pixels = draw(scene)
    for cell in scene.cells:
        patch = pixels[cell.row * 16 + 1 : cell.row * 16 + 15, cell.column * 16 + 1 : cell.column * 16 + 15, 0]
        coarse = np.kron(scans[cell.scan], np.ones((7, 7))).reshape(14, 4, 14, 4).mean((1, 3))
        assert np.corrcoef(coarse.ravel(), patch.ravel().astype(float))[0, 1] > 0.95


def test_noise_is_bounded_and_leaves_the_ground_truth_alone() -> None:
    clean, noisy = (make_scene(SceneOptions(noise=noise), "train", 5) for noise in (0, 8))
    assert clean.cells == noisy.cells
    difference = draw(noisy).astype(int) - draw(clean).astype(int)
    assert np.abs(difference).max() == 8
    assert abs(difference.mean()) < 0.5


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_density_is_the_share_of_filled_cells(density: float) -> None:
    options = SceneOptions(density=density, rows=5, columns=5)
    filled = np.mean([len(make_scene(options, "train", index).cells) for index in range(300)]) / 25
    assert filled == pytest.approx(density, abs=0.03)


def test_two_cells_are_filled_always() -> None:
    assert {len(make_scene(SceneOptions(density=0.0), "train", index).cells) for index in range(50)} == {2}
    assert {len(make_scene(SceneOptions(density=1.0), "train", index).cells) for index in range(50)} == {9}


def test_grid_cell_size_and_colours_are_options() -> None:
    options = SceneOptions(rows=2, columns=4, cell_px=24, colours=("red", "blue"), density=1.0)
    scene = make_scene(options, "test", 0)
    assert draw(scene).shape == (48, 96, 3)
    assert {cell.colour for cell in scene.cells} <= {"red", "blue"}
    assert [cell.place for cell in scene.cells] == list(place_names(2, 4)) == list(scene.places)
    assert all(place.isalpha() for place in scene.places) and len(set(scene.places)) == 8


def test_places_of_three_by_three_cells_are_those_of_the_compass() -> None:
    scene = make_scene(SceneOptions(density=1.0), "train", 0)
    assert tuple(cell.place for cell in scene.cells) == COMPASS
    assert scene.at("centre") == scene.cells[4]
    assert make_scene(SceneOptions(density=0.0), "train", 0).at("nowhere") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colours": ("red", "pink")}, "unknown colour"),
        ({"colours": ("red", "red")}, "named twice"),
        ({"colours": ()}, "at least 1"),
        ({"columns": 1}, "greater than or equal to 2"),
        ({"cell": 8}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SceneOptions(**options)


def test_small_digits_stand_anywhere_in_their_cells() -> None:
    """Ink is found inside of the box that the ground truth tells, and nowhere else."""
    options = SceneOptions(cell_px=32, digit_px=8, noise=0)
    found = set()
    for index in range(60):
        scene = make_scene(options, "train", index)
        ink_HW = (draw(scene) != BACKGROUND).any(axis=-1)
        for cell in scene.cells:
            top, left = cell.row * 32 + cell.top, cell.column * 32 + cell.left
            assert ink_HW[top : top + 8, left : left + 8].any()
            ink_HW[top : top + 8, left : left + 8] = False
            found.add((cell.top, cell.left))
        assert not ink_HW.any()
    assert found == {(8 * row, 8 * column) for row in range(4) for column in range(4)}


def test_a_digit_is_no_larger_than_its_cell() -> None:
    with pytest.raises(ValidationError, match="digit of 24 px does not fit into a cell of 16 px"):
        SceneOptions(digit_px=24)
