"""Teachers `autoencoder_kl` and `vq` against diffusers called by hand in float64, and folders that they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.errors import ModelError
from foveate.teachers.autoencoders import KLOptions, KLTeacher, VQOptions, VQTeacher
from foveate.types import Grid
from tests.unit.teachers.conftest import built, context, inputs, pixels_of

KL = {
    "block_out_channels": [8, 16, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 3, "norm_num_groups": 4, "sample_size": 16,
    "scaling_factor": 0.37, "shift_factor": -0.21,
}  # fmt: skip
VQ = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 3, "norm_num_groups": 4,
    "num_vq_embeddings": 29, "vq_embed_dim": 5,
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(cls: Any, config: dict[str, Any], folder: Path, seed: int = 0) -> Any:
    """An autoencoder of random weights, biases and codes of everyday size too, also written to `folder`."""
    torch.manual_seed(seed)
    model = cls(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.2)
    if cls is VQModel:
        torch.nn.init.normal_(model.quant_conv.weight)
        book = model.quantize.embedding.weight
        book.copy_(model.encode(torch.randn(1, 3, 2, 2 * len(book))).latents[0, :, 0].T)  # so that all codes are used
    model.save_pretrained(folder)
    return model


def packed(maps: Tensor, grid: Grid, side: int) -> Tensor:
    """`[C, h*side, w*side]` → `[N, C*side*side]`, value by value."""
    rows = []
    for down in range(grid[0]):
        for across in range(grid[1]):
            values = []
            for channel in range(len(maps)):
                for y in range(side):
                    for x in range(side):
                        values.append(float(maps[channel, down * side + y, across * side + x]))
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("grid", "patch"), [((3, 3), 1), ((2, 4), 2)])
def test_kl_is_the_scaled_posterior_of_diffusers(
    tmp_path: Path, photos: list[Image.Image], grid: Grid, patch: int
) -> None:
    model = saved(AutoencoderKL, KL, tmp_path / "some" / "vae").double()
    options = KLOptions(pretrained=str(tmp_path / "some"), subfolder="vae", patch=patch)
    teacher = built(KLTeacher, options, context(grid))
    spec, given = KLTeacher.describe(options, context(grid)), inputs(KLTeacher, options, photos, grid)
    side = 4 * patch
    assert (spec.width, spec.grid) == (3 * patch**2, grid)
    assert spec.image_size == (grid[0] * side, grid[1] * side)
    found, double = teacher.encode(given), teacher.double().encode(given)
    for record, exact, picture in zip(found, double, photos, strict=True):
        pixels = pixels_of(picture, *spec.image_size) / 255 * 2 - 1
        moments = model.quant_conv(model.encoder(pixels[None]))[0]
        mean, logvar = packed(moments[:3], grid, patch), packed(moments[3:].clamp(-30, 20), grid, patch)
        mean, std = (mean + 0.21) * 0.37, (logvar / 2).exp() * 0.37
        assert record.keys() == {"mean", "logvar"} and record["mean"].dtype is torch.float32
        torch.testing.assert_close(record["mean"].double(), mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(record["logvar"].double(), 2 * std.log(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(exact["mean"], mean, atol=1e-7, rtol=1e-7)
        noise = torch.randn_like(mean)
        drawn = teacher.sample(exact["mean"], exact["logvar"], noise)
        torch.testing.assert_close(drawn, mean + std * noise, atol=1e-7, rtol=1e-7)


def test_kl_decodes_what_diffusers_decodes(tmp_path: Path) -> None:
    model, grid = saved(AutoencoderKL, KL, tmp_path).double(), (2, 3)
    teacher = built(KLTeacher, KLOptions(pretrained=str(tmp_path), patch=2), context(grid)).double()
    latents = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    rows = torch.stack([packed((one + 0.21) * 0.37, grid, 2) for one in latents]).requires_grad_()
    pixels = teacher.decode(rows)
    assert pixels.shape == (2, 3, 16, 24)
    torch.testing.assert_close(pixels, (model.decode(latents).sample / 2 + 0.5).clamp(0, 1), atol=1e-9, rtol=1e-9)
    pixels.square().sum().backward()
    assert rows.grad is not None and (rows.grad.abs().sum(-1) > 0).all(), "the gradient goes through the decoder"


def test_kl_normalizes_by_channel_where_the_config_does(tmp_path: Path, photos: list[Image.Image]) -> None:
    shift, std = [0.3, -0.4, 1.0], [0.5, 2.0, 0.7]
    config = {**KL, "shift_factor": None, "latents_mean": shift, "latents_std": std}
    model, grid = saved(AutoencoderKL, config, tmp_path).double(), (2, 2)
    options = KLOptions(pretrained=str(tmp_path))
    teacher = built(KLTeacher, options, context(grid)).double()
    record = teacher.encode(inputs(KLTeacher, options, photos[:1], grid))[0]
    mean = model.encode(pixels_of(photos[0], 8, 8)[None] / 127.5 - 1).latent_dist.mean
    for channel in range(3):
        wanted = (mean[0, channel].flatten() - shift[channel]) / std[channel] * 0.37
        torch.testing.assert_close(record["mean"][:, channel], wanted, atol=1e-7, rtol=1e-7)
    wanted = (model.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(teacher.decode(record["mean"][None]), wanted, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("grid", "patch"), [((3, 3), 1), ((2, 4), 2)])
def test_vq_gives_codes_and_their_vectors(tmp_path: Path, photos: list[Image.Image], grid: Grid, patch: int) -> None:
    model = saved(VQModel, VQ, tmp_path).double()
    options = VQOptions(pretrained=str(tmp_path), patch=patch)
    teacher = built(VQTeacher, options, context(grid)).double()
    spec = VQTeacher.describe(options, context(grid))
    assert (spec.width, spec.image_size) == (5 * patch**2, (grid[0] * 2 * patch, grid[1] * 2 * patch))
    found = teacher.encode(inputs(VQTeacher, options, photos, grid))
    book = model.quantize.embedding.weight
    for record, picture in zip(found, photos, strict=True):
        latents = model.encode(pixels_of(picture, *spec.image_size)[None] / 127.5 - 1).latents[0]
        numbers = []
        for y in range(grid[0] * patch):
            for x in range(grid[1] * patch):
                numbers.append(int((book - latents[:, y, x]).square().sum(1).argmin()))
        assert len(set(numbers)) > 3, "else the test shows little"
        assert record["codes"].dtype is torch.int64 and record["codes"].tolist() == numbers
        vectors = book[numbers].T.reshape(5, grid[0] * patch, grid[1] * patch)
        torch.testing.assert_close(record["latents"], packed(vectors, grid, patch))
    rows = torch.stack([record["latents"] for record in found])
    codes = torch.stack([record["codes"] for record in found]).view(2, grid[0] * patch, -1)
    wanted = model.decode(book[codes].permute(0, 3, 1, 2), force_not_quantize=True).sample
    near = (rows + 1e-3 * torch.randn_like(rows)).requires_grad_()
    for given in (rows, near):
        torch.testing.assert_close(teacher.decode(given), (wanted / 2 + 0.5).clamp(0, 1), atol=1e-9, rtol=1e-9)
    teacher.decode(near).square().sum().backward()
    assert near.grad is not None and near.grad.isfinite().all() and near.grad.abs().sum() > 0


def test_vq_with_spatial_norms_decodes_as_diffusers(tmp_path: Path) -> None:
    config = {**VQ, "norm_type": "spatial", "block_out_channels": [32, 32], "latent_channels": 5}
    model = saved(VQModel, config, tmp_path).double()
    teacher = built(VQTeacher, VQOptions(pretrained=str(tmp_path)), context((2, 2))).double()
    vectors = model.quantize.embedding.weight[torch.tensor([3, 1, 4, 1])]
    wanted = model.decode(vectors.T.reshape(1, 5, 2, 2), force_not_quantize=True).sample
    torch.testing.assert_close(teacher.decode(vectors[None]), (wanted / 2 + 0.5).clamp(0, 1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("cls", "config"), [(KLTeacher, KL), (VQTeacher, VQ)])
def test_from_scratch_and_in_bf16_it_goes_there_and_back(
    cls: type[KLTeacher] | type[VQTeacher], config: dict[str, Any], photos: list[Image.Image]
) -> None:
    grid, options = (2, 3), cls.Options(config=config, patch=2)
    teacher, given = built(cls, options, context(grid)), inputs(cls, options, photos, grid)
    first, again = teacher.encode(given), built(cls, options, context(grid)).encode(given)
    for record, other in zip(first, again, strict=True):
        assert all(torch.equal(record[key], other[key]) for key in record), "deterministic"
        assert next(iter(record.values())).shape == (6, cls.describe(options, context(grid)).width)
    teacher.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = torch.stack([next(iter(record.values())) for record in teacher.encode(given)])
    assert rows.dtype is torch.float32
    pixels = teacher.decode(rows)
    assert pixels.shape == (2, 3, *cls.describe(options, context(grid)).image_size)
    assert pixels.dtype is torch.float32 and pixels.min() >= 0 and pixels.max() <= 1


def test_config_stands_for_the_architecture_of_pretrained(tmp_path: Path, photos: list[Image.Image]) -> None:
    saved(AutoencoderKL, KL, tmp_path)
    grid, plain = (2, 2), KLOptions(pretrained=str(tmp_path))
    told = KLOptions(pretrained=str(tmp_path), config={**KL, "scaling_factor": 0.74, "shift_factor": None})
    first = built(KLTeacher, plain, context(grid)).encode(inputs(KLTeacher, plain, photos, grid))[0]["mean"]
    second = built(KLTeacher, told, context(grid)).encode(inputs(KLTeacher, told, photos, grid))[0]["mean"]
    torch.testing.assert_close(second, 2 * (first - 0.21 * 0.37))
    absent = KLOptions(pretrained="nobody/nothing", config=KL)
    assert KLTeacher.describe(absent, context(grid)).image_size == (8, 8)
    assert KLTeacher.prepare_image(absent, photos[0], inputs(KLTeacher, plain, photos, grid).records[0])


def test_folders_of_older_diffusers_load(tmp_path: Path) -> None:
    """Their attention had other names for the same weights, and their config fewer fields."""
    model = saved(AutoencoderKL, {**KL, "scaling_factor": 0.18215, "shift_factor": None}, tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / WEIGHTS)
    for new, old in names.items():
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    assert not state.keys() <= model.state_dict().keys()
    save_file(state, tmp_path / WEIGHTS)
    fields = json.loads((tmp_path / "config.json").read_text())
    keys = ("block_out_channels", "down_block_types", "up_block_types", "latent_channels", "norm_num_groups")
    (tmp_path / "config.json").write_text(json.dumps({key: fields[key] for key in keys}))
    teacher = built(KLTeacher, KLOptions(pretrained=str(tmp_path)), context((2, 2)))
    assert teacher.config["scaling_factor"] == 0.18215
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def refused(cls: type[KLTeacher] | type[VQTeacher], match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        built(cls, cls.Options(**options), context((2, 2)))


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    saved(AutoencoderKL, KL, tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    refused(KLTeacher, "no other file of weights", pretrained=str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved(AutoencoderKL, KL, tmp_path)
    refused(KLTeacher, r"differ in 4 weights: .*quant_conv", pretrained=str(tmp_path),
            config={**KL, "use_quant_conv": False, "use_post_quant_conv": False})  # fmt: skip
    refused(KLTeacher, "shape", pretrained=str(tmp_path), config={**KL, "latent_channels": 4})
    state = load_file(tmp_path / WEIGHTS)
    state.pop("decoder.conv_out.bias")
    save_file(state, tmp_path / WEIGHTS)
    refused(KLTeacher, r"differ in 1 weights: decoder\.conv_out\.bias", pretrained=str(tmp_path))


def test_folders_without_an_autoencoder_are_refused(tmp_path: Path) -> None:
    saved(VQModel, VQ, tmp_path / "vq")
    refused(KLTeacher, "config of VQModel", pretrained=str(tmp_path / "vq"))
    refused(KLTeacher, r"subfolder 'vae'.*Check `pretrained`", pretrained=str(tmp_path), subfolder="vae")
    with pytest.raises(ValidationError, match="no such folder"):
        KLOptions(pretrained=str(tmp_path / "absent"))
    with pytest.raises(ValidationError, match="give `pretrained`"):
        KLOptions(patch=2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latent_chanels": 3}, "latent_chanels"),
        ({"in_channels": 1}, "must be 3"),
        ({"scaling_factor": 0}, "above 0"),
        ({"norm_num_groups": 5}, "divisible"),
    ],
)
def test_configs_that_cannot_work_are_refused_without_weights(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        KLTeacher.describe(KLOptions(config={**KL, **change}), context((2, 2)))
