"""Teacher `features`: what a frozen encoder makes of the picture, on the grid of the visual tokens.

Shapes: I images, N visual tokens of an image, (eh, ew) grid of the encoder, C its width, S side of its pictures.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from foveate.data.images import covered, to_pixels
from foveate.errors import ModelError
from foveate.objective import Layer, ObjectiveContext, Teacher, TeacherInputs, TeacherSpec, resize_rows
from foveate.options import Options
from foveate.recipe_fields import EncoderChoice
from foveate.registry import Component
from foveate.teachers.patches import full
from foveate.types import EncoderSpec, ImageRecord


class FeatureOptions(Options):
    """Features of a frozen encoder: of one of its own, or of the model's own pass."""

    encoder: EncoderChoice | None = Field(
        None, description="A preset, or `type` (default `hf`) and its options. Default: the model's own."
    )  # fmt: skip
    layer: Layer | None = Field(
        None, description="States of the model's encoder: 0 before block 1, k after block k, 0.5 at half the depth, -1 "
        "what the projector reads. Default: -1. An `encoder` has a `layer` among its own options."
    )  # fmt: skip
    normalize: Literal["none", "layer", "l2"] = Field(
        "none", description="Of each row: `layer` to mean 0 and variance 1, `l2` to norm 1."
    )

    @model_validator(mode="after")
    def _check(self) -> FeatureOptions:
        if self.encoder is not None and self.layer is not None:
            raise ValueError("`layer` is for the model's own encoder; put the layer among the options of `encoder`")
        return self


class FeatureTeacher(Teacher):
    """Records `features` `[N, C]`, interpolated from the encoder's grid to that of the visual tokens."""

    Options = FeatureOptions

    @classmethod
    def describe(cls, options: FeatureOptions, context: ObjectiveContext) -> TeacherSpec:
        spec = context.encoder if options.encoder is None else _spec(options.encoder)
        if spec.grid[0] == 1 < spec.grid[1]:
            whose = "the model's encoder" if options.encoder is None else "its encoder"
            raise ModelError(f"teacher features: {whose} gives tokens that have no place: set `select: patch`")
        return TeacherSpec(spec.width, context.visual_grid, (spec.image_size, spec.image_size))

    @classmethod
    def encoder_layers(cls, options: FeatureOptions) -> tuple[Layer, ...]:
        if options.encoder is not None:
            return ()
        return (-1 if options.layer is None else options.layer,)

    @classmethod
    def prepare_image(cls, options: FeatureOptions, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """`pixels` `[3, S, S]` of an encoder of its own: the whole picture under the encoder's patches, squashed."""
        if options.encoder is None:
            return {}
        spec = _spec(options.encoder)
        side = round(spec.image_size * covered(spec)[0])  # what is right of and below the last patch is not read
        rest = spec.image_size - side
        return {"pixels": F.pad(to_pixels(image, replace(spec, image_size=side), "resize"), (0, rest, 0, rest))}

    def __init__(self, options: FeatureOptions, context: ObjectiveContext):
        super().__init__(options, context)
        self.describe(options, context)
        self.encoder = None if options.encoder is None else options.encoder.cls(options.encoder.options)

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        if self.encoder is None:
            features, grid = inputs.encoder_states(*self.encoder_layers(self.options)), inputs.encoder_grid
        else:
            pixels, grid = inputs.stack("pixels"), self.encoder.spec.grid
            features = self.encoder(pixels.to(next(self.encoder.parameters()).dtype)).flatten(0, 1)
        rows = full(features).split(grid[0] * grid[1])
        return [
            {"features": self._normalized(resize_rows(one, grid, record.grid))}
            for one, record in zip(rows, inputs.records, strict=True)
        ]

    def _normalized(self, rows: Tensor) -> Tensor:
        if self.options.normalize == "layer":
            return F.layer_norm(rows, rows.shape[-1:])
        return F.normalize(rows, dim=-1) if self.options.normalize == "l2" else rows


_SPECS: dict[tuple[Any, str], EncoderSpec] = {}


def _spec(encoder: Component) -> EncoderSpec:
    """What an encoder is, looked up once in each process."""
    key = encoder.cls, json.dumps(encoder.resolved(), sort_keys=True)
    if key not in _SPECS:
        _SPECS[key] = encoder.cls.describe(encoder.options)
    return _SPECS[key]
