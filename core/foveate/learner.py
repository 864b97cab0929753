"""The learner: one training step on one page, from a packed batch to sums of losses.

Everything is a **sum**; the loop divides by the counts of the whole step over all processes, which is why neither the
packing, nor the token budget, nor the number of processes changes a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveate.model.lmm import LMM
from foveate.text_loss import greedy_tokens, linear_cross_entropy
from foveate.types import Batch


@dataclass
class LossTerm:
    """A part of the loss on one micro-batch: its sum over units, and named metrics as (sum, count)."""

    total: Tensor
    metrics: dict[str, tuple[Tensor, float]] = field(default_factory=dict)


@dataclass
class StepOutput:
    """What a micro-batch brings: one `LossTerm` a part of the loss, and the text loss of each sample `[samples]`."""

    terms: dict[str, LossTerm]
    text_by_sample: Tensor


class Learner(nn.Module):
    """The LMM and (from their contract on) its objectives as one module: what DDP and FSDP wrap."""

    def __init__(self, lmm: LMM) -> None:
        super().__init__()
        self.lmm = lmm

    def forward(self, batch: Batch) -> StepOutput:
        """Runs the model once; every rank enters the same modules, whatever its batch holds."""
        states_TD = self.lmm(batch)
        weight, bias = self.lmm.llm.head()
        read_SD = states_TD.index_select(0, batch.target_positions) * self.lmm.llm.logit_scale
        total, losses_S = linear_cross_entropy(read_SD, weight, bias, batch.target_ids)
        if torch.is_grad_enabled() and not batch.visual_positions.numel() and self._vision_trained():
            total = total + self._unseen(batch)
        by_sample = losses_S.new_zeros(len(batch.sample_ids)).index_add(0, batch.sample_targets, losses_S)
        return StepOutput({"text": LossTerm(total)}, by_sample)

    def _vision_trained(self) -> bool:
        parts = (self.lmm.projector, self.lmm.encoder)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def _unseen(self, batch: Batch) -> Tensor:
        """Zero, through encoder and projector: a row without an image still gives them a (zero) gradient."""
        side = self.lmm.encoder.spec.image_size
        blank = batch.input_ids.new_zeros((1, 3, side, side), dtype=torch.float32)
        return self.lmm.see(blank).tokens.sum() * 0.0

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Teacher-forced greedy tokens at the supervised positions, `[S]`.

        All of a sample's equal its `target_ids` exactly when greedy decoding would write the reference: up to the first
        difference, both read the same prefix.
        """
        weight, bias = self.lmm.llm.head()
        read_SD = self.lmm(batch).index_select(0, batch.target_positions) * self.lmm.llm.logit_scale
        return greedy_tokens(read_SD, weight, bias)
