"""Vision transformers of timm as encoders, read at one block through `forward_intermediates`."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import Tensor, nn

from foveate.errors import ModelError
from foveate.model.encoder import Encoder
from foveate.options import ExistingPath, Options
from foveate.types import EncoderSpec


class TimmEncoderOptions(Options):
    """Any vision transformer of timm."""

    name: str = Field(description="Name in timm, with or without a tag, as vit_base_patch14_dinov2.lvd142m.")
    pretrained: bool = Field(False, description="Load the weights of `name` from the hub (safetensors only).")
    weights: ExistingPath | None = Field(None, description="Load this safetensors file instead.")
    layer: int | None = Field(None, description="Output of block k; -1: the last. Default: -2 if pretrained, else -1.")
    image_size: int | None = Field(None, gt=0, description="Side of the pictures in pixels. Default: of `name`.")
    args: dict[str, Any] = Field({}, description="Further arguments of `timm.create_model`.")

    @model_validator(mode="after")
    def _check(self) -> TimmEncoderOptions:
        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models())
            raise ValueError(f"timm has no model '{self.name}'; near it: {', '.join(near) or 'none'}")
        if self.weights is not None and (self.pretrained or self.weights.suffix != ".safetensors"):
            raise ValueError("`weights` is a .safetensors file, and takes the place of `pretrained: true`")
        return self


class TimmEncoder(Encoder):
    """A timm vision transformer up to the selected block; state-dict keys are ``model.`` and timm's own."""

    Options = TimmEncoderOptions

    @classmethod
    def describe(cls, options: TimmEncoderOptions) -> EncoderSpec:
        with torch.device("meta"):
            model = _create(options, None).eval()
            facts = timm.data.resolve_model_data_config(model)
            size = options.image_size or facts["input_size"][-1]
            try:
                _, tokens, width = _features(model, torch.empty(1, 3, size, size)).shape
                side = math.isqrt(tokens)
                assert side * side == tokens, f"{tokens} features are no square"
            except Exception as error:  # models without a sequence of patches fail in many ways
                raise ModelError(f"timm encoder {options.name} gives no features of patches: {error}") from error
        resample = Image.Resampling[facts["interpolation"].upper()]
        return EncoderSpec(size, (side, side), width, facts["mean"], facts["std"], resample)

    def __init__(self, options: TimmEncoderOptions, load_weights: bool = True) -> None:
        super().__init__(options, load_weights)
        self.spec, self._options = self.describe(options), options
        self.model = _create(options, _weights(options) if load_weights else None)

    def forward(self, pixels: Tensor) -> Tensor:
        return _features(self.model, pixels.to(next(self.parameters()).dtype))

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def portable_options(self) -> dict[str, Any]:
        return {**self._options.model_dump(include={"name", "image_size", "args"}), "layer": len(self.blocks())}


def _features(model: Any, pixels: Tensor) -> Tensor:
    return model.forward_intermediates(pixels, indices=1, output_fmt="NLC", intermediates_only=True)[0]


def _weights(options: TimmEncoderOptions) -> Path | None:
    if not options.pretrained:
        return options.weights
    try:
        known: Any = timm.models.get_pretrained_cfg(options.name)
        return Path(hf_hub_download(known.hf_hub_id, "model.safetensors"))
    except Exception as error:  # timm knows no weights, the hub no such file, or there is no network
        raise ModelError(f"no weights of {options.name} from the hub; give a file as `weights`. {error}") from error


def _create(options: TimmEncoderOptions, file: Path | None) -> Any:
    """The model up to the selected block; `file` must hold exactly the weights of the whole model."""
    given: dict[str, Any] = {"num_classes": 0, "img_size": options.image_size}  # timm leaves out what is None
    try:
        if file is not None:
            with safe_open(file, "pt") as tensors:
                headed = "head.weight" in tensors.keys()  # noqa: SIM118
                classes = tensors.get_slice("head.weight").get_shape()[0] if headed else 0
            # timm is strict about keys only where the model has as many classes as the file is said to have
            source = {"file": str(file), "custom_load": False, "num_classes": classes}
            given |= {"num_classes": classes, "pretrained": True, "pretrained_cfg_overlay": source}
        model: Any = timm.create_model(options.name, **given, **options.args)
        blocks, default = len(model.blocks), -2 if options.pretrained or options.weights else -1
        layer = options.layer if options.layer is not None else default
        index = layer - 1 if layer > 0 else blocks + layer
        if not 0 <= index < blocks:
            raise ValueError(f"it has {blocks} blocks, so `layer` is 1 to {blocks}, or {-blocks} to -1, not {layer}")
        model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    except Exception as error:  # architectures raise what they like; those without blocks are no vision transformers
        raise ModelError(f"timm encoder {options.name} cannot be built as a vision transformer: {error}") from error
    return model
