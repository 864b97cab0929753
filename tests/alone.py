"""Gradients of each part of the loss by forward and backward passes of its own: what the probe is held to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.objective import Moment
from foveate.stage import StageLoop

Weights = Callable[[str, int], float]
"""Part of the loss and step, from 0 → its weight."""


def measured(loop: StageLoop, work: Any, weights: Weights) -> dict[str, float]:
    """What a step of one process must log. The model runs anew for each part, with weights of 0 for all others."""
    session, step = loop.session, loop.step
    moment = Moment(session.recipe.seed, loop.stage.name, step)
    active = [name for name, part in loop.active.items() if part.options.takes_part(name, moment)]
    parts = ["text", *active]
    trained = {name for part in loop.parts for name in part.parameters}
    gradients: dict[tuple[str, str], Tensor] = {}
    for part in parts:
        learner = copy.deepcopy(session.learner)
        learner.zero_grad(set_to_none=True)
        for batch in work.batches:
            terms = learner(batch, moment, active).terms
            factors = {name: weights(name, step) if name == part else 0.0 for name in terms}
            sum(factors[name] * term.total / max(work.counts[name], 1) for name, term in terms.items()).backward()
        for place in ("projector", "llm"):
            own = [
                torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in getattr(learner.lmm, place).named_parameters()
                if f"{place}.{name}" in trained
            ]
            if own:
                gradients[part, place] = torch.cat([gradient.flatten() for gradient in own])
    found = {f"gradient/{part}/{place}": float(gradient.norm()) for (part, place), gradient in gradients.items()}
    for (first, second), place in itertools.product(itertools.combinations(parts, 2), ("projector", "llm")):
        if (first, place) in gradients:
            one, two = gradients[first, place], gradients[second, place]
            if one.norm() and two.norm():
                found[f"cosine/{first}~{second}/{place}"] = float(one @ two / one.norm() / two.norm())
    return found


@contextmanager
def watched(weights: Weights) -> Iterator[dict[tuple[str, int], dict[str, float]]]:
    """In here the steps of this process are `measured` before they are taken: stage and step, from 1 → metrics."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    take = StageLoop._take_step

    def taken(loop: StageLoop, work: Any, optimizer: Any) -> dict[str, float]:
        found[loop.stage.name, loop.step + 1] = measured(loop, work, weights)
        return take(loop, work, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "_take_step", taken)
        yield found


def logged(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line of metrics says of gradients of parts."""
    return {key: value for key, value in line.items() if key.startswith(("gradient/", "cosine/"))}
