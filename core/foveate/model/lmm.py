"""The LMM: encoder → projector → LLM, on one packed row.

Shapes: T tokens of the row, V visual tokens of the row, I images, N = h*w visual tokens an image, E width of the
encoder, D width of the LLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.errors import DataError
from foveate.model.attention import Segments
from foveate.model.encoder import Encoder
from foveate.model.language import LanguageModel
from foveate.model.projector import Projector
from foveate.types import Batch

PARTS = ("encoder", "projector", "llm")


@dataclass
class Vision:
    """What the visual half made of a row's `input` images."""

    features: Tensor
    """`[I, h*w, E]`, the encoder's."""
    tokens: Tensor
    """`[V, D]`, the projector's, image after image."""


class LMM(nn.Module):
    """A large multimodal model. Its parts are its only children; their names prefix the state dict."""

    def __init__(self, encoder: Encoder, projector: Projector, llm: LanguageModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.llm = llm

    def see(self, pixels: Tensor) -> Vision:
        """Pixels `[I, 3, H, W]` → features and visual tokens; a frozen encoder runs without a graph."""
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features_INE = self.encoder(pixels.to(next(self.encoder.parameters()).dtype))
        dtype = next(self.projector.parameters()).dtype
        tokens_IND = self.projector(features_INE.to(dtype))
        return Vision(features_INE, tokens_IND.flatten(0, 1))

    def place(self, batch: Batch, visual_tokens: Tensor) -> Tensor:
        """The LLM's input `[T, D]`: text embeddings, and `visual_tokens` `[V, D]` at the recorded positions.

        Raises `DataError` when the numbers of visual tokens and of their places differ.
        """
        places = batch.visual_positions.numel()
        if visual_tokens.shape[0] != places:
            raise DataError(
                f"{visual_tokens.shape[0]} visual tokens for {places} places; samples {', '.join(batch.sample_ids)}"
            )
        embeds_TD = self.llm.embed(batch.input_ids)
        return embeds_TD.index_copy(0, batch.visual_positions, visual_tokens.to(embeds_TD.dtype))

    def run(self, embeds: Tensor, batch: Batch) -> Tensor:
        """LLM inputs `[T, D]` → states after its final norm `[T, D]`."""
        return self.llm(embeds, batch.position_ids, Segments.of(batch.lengths, embeds.device))

    def forward(self, batch: Batch) -> Tensor:
        """States after the LLM's final norm, `[T, D]`."""
        shown = [row for row, image in enumerate(batch.images) if image.role == "input"]
        if not shown:
            return self.run(self.llm.embed(batch.input_ids), batch)
        pixels = batch.pixels if len(shown) == len(batch.images) else batch.pixels[shown]
        return self.run(self.place(batch, self.see(pixels).tokens), batch)

    def logits(self, batch: Batch) -> Tensor:
        """Logits at every position, `[T, V]`: for inspection and tests; training never makes them."""
        weight, bias = self.llm.head()
        return nn.functional.linear(self(batch) * self.llm.logit_scale, weight, bias)
