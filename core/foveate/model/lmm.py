"""The LMM: encoder → projector → LLM, on one packed row.

Shapes: T tokens of the row, V visual tokens of the row, I images, N = h*w visual tokens an image, E width of the
encoder, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveate.errors import DataError
from foveate.model.attention import Segments
from foveate.model.encoder import Encoder
from foveate.model.language import LanguageModel
from foveate.model.projector import Projector
from foveate.model.taps import END, tapped
from foveate.types import Batch

PARTS = ("encoder", "projector", "llm")


@dataclass
class Vision:
    """What the visual half made of a row's `input` images."""

    features: Tensor
    """`[I, h*w, E]`, the encoder's."""
    tokens: Tensor
    """`[V, D]`, the projector's, image after image."""
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    """The encoder's states at the layers that were asked for, `[I, h*w, E]` each; `END` are the features."""


def encode(encoder: Encoder, pixels: Tensor, layers: Iterable[int] = ()) -> dict[int, Tensor]:
    """Pixels `[I, 3, H, W]` → the encoder's features (`END`) and its states at `layers`, `[I, h*w, E]` each.

    A frozen encoder runs without a graph.
    """
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    rows, columns = encoder.spec.grid
    graph = torch.set_grad_enabled(trained and torch.is_grad_enabled())
    with graph, tapped(encoder.blocks(), layers) as found:
        features_INE = encoder(pixels.to(next(encoder.parameters()).dtype))
    # CLS and register tokens stand before the patches
    return {END: features_INE, **{layer: states[:, -rows * columns :] for layer, states in found.items()}}


class LMM(nn.Module):
    """A large multimodal model. Its parts are its only children; their names prefix the state dict."""

    def __init__(self, encoder: Encoder, projector: Projector, llm: LanguageModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.llm = llm

    def see(self, pixels: Tensor, layers: Iterable[int] = ()) -> Vision:
        """Pixels `[I, 3, H, W]` → features, visual tokens, and the encoder's states at `layers`."""
        found = encode(self.encoder, pixels, layers)
        dtype = next(self.projector.parameters()).dtype
        tokens_IND = self.projector(found[END].to(dtype))
        return Vision(found[END], tokens_IND.flatten(0, 1), found)

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
