"""Encoder `quantized`: another encoder's features, each replaced by the sum of its codebooks' vectors.

The first rows of the paper's Table 1 (arXiv 2506.09040) train with such inputs: what the LLM sees is discrete.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from foveate import Encoder, EncoderChoice, EncoderSpec, ExistingPath, Options
from foveate.errors import ModelError
from foveate.registry import Component
from foveate_asvr.folder import CODEBOOKS, ENCODER, Card, load_weights, read_card
from foveate_asvr.quantizer import ResidualQuantizer


class Architecture(Options):
    """A quantised encoder without its weights."""

    encoder: EncoderChoice = Field(description="Whose features are quantised: a preset, or `type` and its options.")
    depth: int = Field(8, gt=0, description="Codes of a feature.")
    codebook_size: int = Field(16384, gt=1, description="Codes of a codebook.")
    shared: bool = Field(False, description="One codebook for all depths.")


class QuantizedOptions(Options):
    """The encoder and the codebooks of a semantic tokenizer, as the model's encoder."""

    tokenizer: ExistingPath | None = Field(
        None, description="Folder of a tokenizer with an encoder of its own: fitted with `encoder`, or imported."
    )  # fmt: skip
    architecture: Architecture | None = Field(
        None, description="In its place, where weights come from a model folder, or none are needed: `foveate plan`."
    )

    @model_validator(mode="after")
    def _check(self) -> QuantizedOptions:
        if (self.tokenizer is None) == (self.architecture is None):
            raise ValueError("give `tokenizer`, the folder of a fitted or imported tokenizer")
        return self


class QuantizedEncoder(Encoder):
    """Features of `wrapped`, quantised; a gradient passes straight through to the features as they were."""

    Options = QuantizedOptions

    @classmethod
    def describe(cls, options: QuantizedOptions) -> EncoderSpec:
        wrapped = _architecture(options).encoder
        spec: EncoderSpec = wrapped.cls.describe(wrapped.options)
        return spec

    def __init__(self, options: QuantizedOptions, load_weights: bool = True) -> None:
        super().__init__(options, load_weights)
        made = _architecture(options)
        component: Component = made.encoder
        self._type = component.type
        self.wrapped: Encoder = component.cls(component.options, load_weights=False)
        self.spec = self.wrapped.spec
        self.quantizer = ResidualQuantizer(made.depth, made.codebook_size, self.spec.width, made.shared)
        if load_weights:
            _load(options, self)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.wrapped(pixels)
        flat = features.flatten(0, 1)
        with torch.no_grad():
            quantised = self.quantizer.decode(self.quantizer.encode(flat)).to(flat.dtype)
        return (flat + (quantised - flat).detach() if flat.requires_grad else quantised).view_as(features)

    def blocks(self) -> list[nn.Module]:
        return self.wrapped.blocks()

    def portable_options(self) -> dict[str, Any]:
        encoder = {"type": self._type, **self.wrapped.portable_options()}
        quantizer = self.quantizer
        facts = {"depth": quantizer.depth, "codebook_size": quantizer.size, "shared": quantizer.shared}
        return {"architecture": {"encoder": encoder, **facts}}


def _card(options: QuantizedOptions) -> Card | None:
    """Raises `ModelError` where the folder is no semantic tokenizer with an encoder of its own."""
    if options.tokenizer is None:
        return None
    card = read_card(options.tokenizer, "semantic")
    if card.encoder is None:
        raise ModelError(
            f"the tokenizer {options.tokenizer} has no encoder of its own: it was fitted to a model's. Fit one with "
            "`tokenizer: {encoder: …}`, or import one"
        )
    return card


def _architecture(options: QuantizedOptions) -> Architecture:
    card = _card(options)
    if card is None:
        assert options.architecture is not None
        return options.architecture
    facts = {"depth": card.depth, "codebook_size": card.codebook_size, "shared": card.shared}
    return Architecture.model_validate({"encoder": card.component(), **facts})


def _load(options: QuantizedOptions, encoder: QuantizedEncoder) -> None:
    if options.tokenizer is None:
        raise ModelError("encoder quantized: `architecture` brings no weights; give `tokenizer`")
    load_weights(options.tokenizer, ENCODER, encoder.wrapped)
    holder = nn.Module()
    holder.quantizer = encoder.quantizer
    load_weights(options.tokenizer, CODEBOOKS, holder)
