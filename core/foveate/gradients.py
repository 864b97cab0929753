"""How the parts of the loss pull at projector and LLM: norms of their gradients, and cosines between them.

It only looks. The backward passes go through the graph that the step has made, before the step's own, and write into
no `.grad`: losses, weights and random draws are bit by bit what they are without it. Checkpointed blocks restore the
random state when they are computed again; DDP's hooks sit where these passes do not come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.optim import TrainedPart

PLACES = ("projector", "llm")


class GradientProbe:
    """The gradient of each part of the loss, over all micro-batches of one step."""

    def __init__(self, trained: Iterable[TrainedPart], terms: Iterable[str]) -> None:
        """`trained`: of these, projector and LLM are looked at. `terms`: parts of the loss, equal on every process."""
        self._parameters: list[nn.Parameter] = []
        self._places: list[str] = []  # of each parameter
        for part in trained:
            place = part.name.partition(".")[0]
            if place in PLACES:
                self._parameters += part.parameters.values()
                self._places += [place] * len(part.parameters)
        self._sums = {name: [_zeros(parameter) for parameter in self._parameters] for name in terms}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds the gradients of a micro-batch's terms, as they enter the loss. Their graph stays."""
        for name, sums in self._sums.items():
            if not self._parameters or not terms[name].requires_grad:
                continue
            found = torch.autograd.grad(terms[name], self._parameters, retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient

    def metrics(self, accelerator: Any) -> dict[str, float]:
        """Of the sums over all processes, each of which must call it: `gradient/PART/PLACE`, `cosine/PART~OTHER/PLACE`.

        A cosine is left out where one of the norms is 0.
        """
        pairs = list(itertools.combinations_with_replacement(self._sums, 2))
        products = {place: [0.0] * len(pairs) for place in PLACES if place in self._places}
        for at, place in enumerate(self._places):
            for sums in self._sums.values():
                sums[at] = accelerator.reduce(sums[at], "sum")
            own = torch.stack([(self._sums[first][at] * self._sums[second][at]).sum() for first, second in pairs])
            products[place] = [before + new for before, new in zip(products[place], own.tolist(), strict=True)]
        found: dict[str, float] = {}
        for place, numbers in products.items():
            by_pair = dict(zip(pairs, numbers, strict=True))
            norms = {name: math.sqrt(by_pair[name, name]) for name in self._sums}
            found |= {f"gradient/{name}/{place}": norm for name, norm in norms.items()}
            for (first, second), product in by_pair.items():
                if first != second and norms[first] and norms[second]:
                    found[f"cosine/{first}~{second}/{place}"] = product / norms[first] / norms[second]
        return found


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
