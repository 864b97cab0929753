"""The learner: one training step on one page, from a packed batch to sums of losses.

Everything is a **sum**; the loop divides by the counts of the whole step over all processes, which is why neither the
packing, nor the token budget, nor the number of processes changes a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.data.views import ObjectiveRule
from foveate.errors import PluginError
from foveate.forward_pass import ForwardPass
from foveate.model.lmm import LMM
from foveate.objective import LossTerm, Moment, Outputs, Targets, VisionObjective
from foveate.targets import TeacherRoom, called
from foveate.text_loss import greedy_tokens, linear_cross_entropy
from foveate.types import Batch


@dataclass
class StepOutput:
    """What a micro-batch brings: one `LossTerm` a part of the loss, and the text loss of each sample `[samples]`."""

    terms: dict[str, LossTerm]
    text_by_sample: Tensor


@dataclass(frozen=True)
class Seen:
    """What an objective sees of a micro-batch, and the state of its edit: the arguments of its `loss`."""

    outputs: Outputs
    targets: Targets
    state: Any


class Learner(nn.Module):
    """The LMM and its objectives as one module: what DDP and FSDP wrap. Teachers stay outside."""

    def __init__(
        self,
        lmm: LMM,
        objectives: Mapping[str, VisionObjective] | None = None,
        teachers: TeacherRoom | None = None,
    ) -> None:
        """`teachers`: where they are not to be built here, on the CPU in float32."""
        super().__init__()
        self.lmm = lmm
        self.objectives = nn.ModuleDict()
        self.objectives._modules.update(objectives or {})  # a name such as `half` is an attribute of every module
        self.rules = {name: ObjectiveRule(name, type(part), part.options) for name, part in (objectives or {}).items()}
        self.teachers = teachers or TeacherRoom(objectives or {})

    def forward(self, batch: Batch, moment: Moment | None = None, active: Collection[str] | None = None) -> StepOutput:
        """Runs the model once; every rank enters the same modules, whatever its batch holds.

        `active`: the objectives that take part, of those that the batch was packed for; None: all of them. Raises
        `PluginError` where one of them fails.
        """
        run = self._run(batch, moment, active)
        weight, bias = self.lmm.llm.head()
        read_SD = run.states.index_select(0, batch.target_positions) * self.lmm.llm.logit_scale
        total, losses_S = linear_cross_entropy(read_SD, weight, bias, batch.target_ids)
        by_sample = losses_S.new_zeros(len(batch.sample_ids)).index_add(0, batch.sample_targets, losses_S)
        terms = {"text": LossTerm(total)}
        for name, objective in run.objectives.items():
            terms[name] = self._loss(name, objective, run)
        return StepOutput(terms, by_sample)

    def look(
        self, batch: Batch, moment: Moment | None = None, active: Collection[str] | None = None
    ) -> dict[str, Seen]:
        """What each objective sees of a batch, without losses: for `visualize`, and for inspection."""
        run = self._run(batch, moment, active)
        with torch.autocast(run.states.device.type, enabled=False):
            return {name: _seen(name, run) for name in run.objectives}

    def _run(self, batch: Batch, moment: Moment | None, active: Collection[str] | None) -> ForwardPass:
        parts: Any = dict(self.objectives.items())
        return ForwardPass(self.lmm, batch, parts, self.rules, moment or Moment(), active, self.teachers)

    def _loss(self, name: str, objective: nn.Module, run: ForwardPass) -> LossTerm:
        """An objective's sum and metrics, in full precision; those of a stand-in count zero."""
        with torch.autocast(run.states.device.type, enabled=False):
            seen = _seen(name, run)
            term: LossTerm = called(objective, name, "loss", seen.outputs, seen.targets, seen.state)  # type: ignore[arg-type]
        if not isinstance(term, LossTerm) or not isinstance(term.total, Tensor) or term.total.numel() != 1:
            raise PluginError(f"objective '{name}': loss must return LossTerm(total, metrics) with a scalar tensor")
        if wrong := [key for key, pair in term.metrics.items() if not isinstance(pair, tuple) or len(pair) != 2]:
            raise PluginError(f"objective '{name}': metric '{wrong[0]}' must be a pair (sum, count)")
        if not run.rows[name].dummy:
            return term
        if not math.isfinite(float(term.total.detach())):
            raise PluginError(
                f"objective '{name}': its loss is {float(term.total.detach())} on the dummy picture of a row without "
                "an image; it must be finite for any picture"
            )
        nothing = {key: torch.zeros_like(sums) for key, sums in term.statistics.items()}
        return LossTerm(term.total * 0.0, {metric: (0.0, 0.0) for metric in term.metrics}, nothing)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Teacher-forced greedy tokens at the supervised positions, `[S]`.

        All of a sample's equal its `target_ids` exactly when greedy decoding would write the reference: up to the first
        difference, both read the same prefix.
        """
        weight, bias = self.lmm.llm.head()
        read_SD = self.lmm(batch).index_select(0, batch.target_positions) * self.lmm.llm.logit_scale
        return greedy_tokens(read_SD, weight, bias)


def _seen(name: str, run: ForwardPass) -> Seen:
    edit = run.edits.get(name)
    return Seen(run.outputs(name), run.targets(name), edit.state if edit else None)
