"""Teacher `features` against the encoders called by hand, and against weights of interpolation written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from foveate.data.images import aligned, to_pixels
from foveate.errors import ModelError
from foveate.objective import TeacherInputs
from foveate.teachers.features import FeatureOptions, FeatureTeacher
from foveate.types import EncoderSpec, Grid
from tests.unit.teachers.conftest import HALF, built, context, inputs, records

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", "intermediate_size": 48, **SIZE}
DINO = {"model_type": "dinov2", "mlp_ratio": 2, **SIZE}


def moved(rows: Tensor, grid: Grid, to: Grid) -> Tensor:
    """`[gh*gw, C]` → `[h*w, C]` by a tent as wide as the larger of the two cells, centres matched, edges cut off."""

    def weights(old: int, new: int) -> Tensor:
        step, width = old / new, max(old / new, 1.0)
        table = torch.zeros(new, old, dtype=torch.float64)
        for row in range(new):
            for column in range(old):
                table[row, column] = max(0.0, 1 - abs((row + 0.5) * step - 0.5 - column) / width)
        return table / table.sum(1, keepdim=True)

    down, across = weights(grid[0], to[0]), weights(grid[1], to[1])
    return torch.einsum("yi,xj,ijc->yxc", down, across, rows.double().view(*grid, -1)).flatten(0, 1)


@pytest.mark.parametrize("grid", [(3, 3), (2, 2), (4, 7)])
def test_an_encoder_of_its_own(tmp_path: Path, photos: list[Image.Image], grid: Grid) -> None:
    torch.manual_seed(1)
    fields = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**fields, vision_use_head=False)).eval()
    model.save_pretrained(tmp_path)
    processor = hf.SiglipImageProcessor(size={"height": 12, "width": 12}, resample=Image.Resampling.BICUBIC)
    processor.save_pretrained(tmp_path)
    options = FeatureOptions.model_validate({"encoder": {"pretrained": str(tmp_path), "layer": 2}})
    assert FeatureTeacher.encoder_layers(options) == ()
    spec = FeatureTeacher.describe(options, context(grid))
    assert (spec.width, spec.grid, spec.image_size) == (24, grid, (12, 12))
    teacher = built(FeatureTeacher, options, context(grid))
    found = teacher.encode(inputs(FeatureTeacher, options, photos, grid))
    for record, picture in zip(found, photos, strict=True):
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        states = model(pixels, output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(record["features"].double(), moved(states, (3, 3), grid), atol=1e-5, rtol=1e-5)


def test_an_encoder_of_timm_in_bf16(photos: list[Image.Image]) -> None:
    arguments = {"embed_dim": 24, "depth": 3, "num_heads": 3}
    encoder = {"type": "timm", "name": "vit_tiny_patch16_224", "image_size": 32, "layer": 2, "args": arguments}
    options = FeatureOptions.model_validate({"encoder": encoder})
    teacher = built(FeatureTeacher, options, context((2, 2)))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **arguments).eval()
    model.load_state_dict(teacher.encoder.model.state_dict(), strict=False)
    given = inputs(FeatureTeacher, options, photos, (2, 2))
    states = model.forward_intermediates(given.stack("pixels"), indices=[1], output_fmt="NLC", intermediates_only=True)
    for record, wanted in zip(teacher.encode(given), states[0], strict=True):
        torch.testing.assert_close(record["features"], wanted, atol=1e-5, rtol=1e-5)
    teacher.to(torch.bfloat16)
    for record, wanted in zip(teacher.encode(given), states[0], strict=True):
        assert record["features"].dtype is torch.float32
        torch.testing.assert_close(record["features"], wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_an_encoder_of_timm_from_a_folder(tmp_path: Path, photos: list[Image.Image], name: str) -> None:
    """As the hub has it: config.json and model.safetensors, the head among the weights."""
    patch = 16 if "deit" in name else 14
    arguments = {"embed_dim": 24, "depth": 3, "num_heads": 3}
    torch.manual_seed(3)
    model = timm.create_model(name, img_size=2 * patch, num_classes=5, **arguments).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    encoder = {"type": "timm", "name": name, "image_size": 2 * patch, "layer": -1, "args": arguments}
    encoder["weights"] = str(tmp_path / "model.safetensors")
    options = FeatureOptions.model_validate({"encoder": encoder, "normalize": "layer"})
    teacher = built(FeatureTeacher, options, context((2, 2)), seed=4)
    given = inputs(FeatureTeacher, options, photos, (2, 2))
    states = model.forward_intermediates(given.stack("pixels"), indices=[2], output_fmt="NLC", intermediates_only=True)
    for record, wanted in zip(teacher.encode(given), states[0].detach(), strict=True):
        centred = wanted - wanted.mean(1, keepdim=True)
        wanted = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(record["features"], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, 0, 2, 0.5])
def test_the_models_own_pass(layer: Any) -> None:
    grid, own, asked = (2, 3), (4, 5), []
    states = torch.randn(2 * 20, 7)

    def read(wanted: Any) -> Tensor:
        asked.append(wanted)
        return states

    options = FeatureOptions(layer=layer)
    where = context(grid, EncoderSpec(20, own, 7, HALF, HALF))
    assert FeatureTeacher.describe(options, where).width == 7
    assert FeatureTeacher.prepare_image(options, Image.new("RGB", (4, 4)), records(1, grid)[0]) == {}
    found = built(FeatureTeacher, options, where).encode(TeacherInputs(records(2, grid), [{}, {}], read, own))
    assert tuple(asked) == FeatureTeacher.encoder_layers(options) == (-1 if layer is None else layer,)
    for record, part in zip(found, states.split(20), strict=True):
        torch.testing.assert_close(record["features"].double(), moved(part, own, grid), atol=1e-6, rtol=1e-6)


def test_rows_are_normalized_as_asked() -> None:
    states, grid = 5 * torch.randn(9, 24, dtype=torch.float64) + 2, (2, 4)
    plain = moved(states, (3, 3), grid)
    centred = plain - plain.mean(1, keepdim=True)
    wanted = {
        "none": plain,
        "layer": centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt(),
        "l2": plain / plain.square().sum(1, keepdim=True).sqrt(),
    }
    for kind, rows in wanted.items():
        teacher = built(FeatureTeacher, FeatureOptions.model_validate({"normalize": kind}), context(grid))
        given = TeacherInputs(records(1, grid), [{}], lambda layer: states, (3, 3))
        torch.testing.assert_close(teacher.encode(given)[0]["features"], rows)


def test_features_lie_where_the_visual_tokens_do(photos: list[Image.Image]) -> None:
    """Patches of 4 cover 12 of 14 pixels. The teacher sees the covered area, and what lies beyond is not read."""
    encoder = {"config": {**SIGLIP, "image_size": 14}}
    options = FeatureOptions.model_validate({"encoder": encoder})
    teacher = built(FeatureTeacher, options, context((3, 3)))
    spec, photo = teacher.encoder.spec, photos[1].resize((140, 140))
    own = to_pixels(photo, spec, "resize")
    given = inputs(FeatureTeacher, options, [aligned(photo, spec, "resize")], (3, 3))
    pixels = given.stack("pixels")[0]
    assert pixels.shape == own.shape == (3, 14, 14)
    torch.testing.assert_close(pixels[:, :10, :10], own[:, :10, :10], atol=0.02, rtol=0)  # the rest lacks neighbours
    noisy = pixels.clone()
    noisy[:, 12:], noisy[:, :, 12:] = torch.randn(3, 2, 14), torch.randn(3, 14, 2)
    other = TeacherInputs(given.records, [{"pixels": noisy}])
    assert torch.equal(teacher.encode(other)[0]["features"], teacher.encode(given)[0]["features"])


def test_tokens_without_a_place_are_refused() -> None:
    options = FeatureOptions.model_validate({"encoder": {"config": DINO, "select": "full"}})
    for make in (FeatureTeacher.describe, FeatureTeacher):
        with pytest.raises(ModelError, match=r"its encoder .*`select: patch`"):
            make(options, context((3, 3)))
    with pytest.raises(ModelError, match=r"the model's encoder .*`select: patch`"):
        FeatureTeacher.describe(FeatureOptions(), context((1, 10), EncoderSpec(12, (1, 10), 24, HALF, HALF)))


def test_a_layer_is_said_in_one_place() -> None:
    with pytest.raises(ValidationError, match="among the options of `encoder`"):
        FeatureOptions.model_validate({"encoder": {"config": SIGLIP, "layer": 1}, "layer": 1})
