"""Projectors against plain formulas, stock Llava's projector, and torch's own pixel_unshuffle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from foveate.errors import ModelError
from foveate.model.projector import LinearProjector, MLPProjector, PixelShuffleProjector, Projector

torch.set_num_threads(1)


def features(grid: tuple[int, int] = (4, 6), width: int = 5) -> Tensor:
    return torch.randn(2, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(0))


def test_linear() -> None:
    projector = LinearProjector(LinearProjector.Options(), 5, 8, (4, 6))
    weight, bias = projector.state_dict()["layers.0.weight"], projector.state_dict()["layers.0.bias"]
    assert torch.allclose(projector(features()), features() @ weight.T + bias, atol=1e-6)
    assert LinearProjector(LinearProjector.Options(bias=False), 5, 8, (4, 6)).state_dict().keys() == {"layers.0.weight"}


@pytest.mark.parametrize("bias", [True, False])
def test_depth_two_is_llavas_projector(bias: bool) -> None:
    config: Any = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 5, "num_attention_heads": 1},
        text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2},
        multimodal_projector_bias=bias,
    )
    stock = LlavaMultiModalProjector(config)
    projector = MLPProjector(MLPProjector.Options(bias=bias), 5, 8, (4, 6))
    names = {"linear_1": "layers.0", "linear_2": "layers.2"}
    projector.load_state_dict({name.replace(name[:8], names[name[:8]]): x for name, x in stock.state_dict().items()})
    assert torch.equal(projector(features()), stock(features()))


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_depth_counts_linear_layers(depth: int) -> None:
    projector = MLPProjector(MLPProjector.Options(depth=depth), 5, 8, (4, 6))
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(5, 8)] + [(8, 8)] * (depth - 1)
    expected = features()
    for index, layer in enumerate(layers):
        expected = layer(expected)
        if index < depth - 1:
            expected = expected * (1 + torch.erf(expected / 2**0.5)) / 2
    assert torch.allclose(projector(features()), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2])
def test_pixel_shuffle_joins_squares_of_neighbours(factor: int) -> None:
    options = PixelShuffleProjector.Options(factor=factor, depth=1, bias=False)
    projector = PixelShuffleProjector(options, 5, 8, (4, 6))
    image = features().unflatten(1, (4, 6)).permute(0, 3, 1, 2)  # [I, C, h, w]
    # torch puts a square's channels as (channel, row, column), ours as (row, column, channel)
    squares = nn.functional.pixel_unshuffle(image, factor).unflatten(1, (5, factor**2)).transpose(1, 2).flatten(1, 2)
    tokens = squares.flatten(2).transpose(1, 2)
    assert torch.allclose(projector(features()), tokens @ projector.state_dict()["layers.0.weight"].T, atol=1e-6)
    rows, columns = PixelShuffleProjector.out_grid(options, (4, 6))
    assert (rows, columns) == (4 // factor, 6 // factor)
    assert projector(features()).shape == (2, rows * columns, 8)


def test_pixel_shuffle_refuses_a_grid_that_it_would_have_to_pad() -> None:
    options = PixelShuffleProjector.Options(factor=2)
    with pytest.raises(ModelError, match="factor 2 cannot divide the encoder's 27×27 grid"):
        PixelShuffleProjector.out_grid(options, (27, 27))
    with pytest.raises(ModelError, match="4×5"):
        PixelShuffleProjector(options, 5, 8, (4, 5))


@pytest.mark.parametrize("kind", [LinearProjector, MLPProjector, PixelShuffleProjector])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalized_tokens_have_norm_one(kind: type[Projector], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    raw = kind(kind.Options.model_validate({}), 5, 256, (4, 6)).to(dtype)
    unit = kind(kind.Options.model_validate({"normalize": True}), 5, 256, (4, 6)).to(dtype)
    unit.load_state_dict(raw.state_dict())
    tokens, reference = unit(features()), raw(features()).double()
    assert tokens.dtype == dtype
    expected = reference / reference.square().sum(-1, keepdim=True).sqrt()
    assert torch.allclose(tokens.double(), expected, atol=4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", [LinearProjector, MLPProjector, PixelShuffleProjector])
def test_options_rebuild_the_projector(kind: type[Projector]) -> None:
    changed: dict[str, Any] = {"normalize": True, "bias": False}
    changed |= {"depth": 3} if "depth" in kind.Options.model_fields else {}
    projector = kind(kind.Options.model_validate(changed), 5, 8, (4, 6))
    again = kind(kind.Options.model_validate(projector.portable_options()), 5, 8, (4, 6))
    again.load_state_dict(projector.state_dict(), strict=True)
    assert torch.equal(again(features()), projector(features()))
    assert all(description for field in kind.Options.model_fields.values() if (description := field.description))


def test_wrong_options() -> None:
    for wrong in ({"depth": 0}, {"factor": 0}, {"width": 3}):
        with pytest.raises(ValidationError):
            PixelShuffleProjector.Options.model_validate(wrong)
