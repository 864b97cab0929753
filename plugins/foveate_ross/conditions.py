"""Does the head listen to the model? Its loss with each image's own states, and with those of another image.

A denoiser can lower its loss by looking at the noisy target alone. Only where another image's states make it worse has
it learned from the LLM's, and only then does its gradient tell the LLM anything about the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from foveate import LoadedRun, LossTerm
from foveate.errors import RunError, UserError
from foveate_ross.groups import Group
from foveate_ross.heads import QUARTERS
from foveate_ross.objective import Reconstruction

COUNT = 256
"""Images that are compared, unless a caller says how many."""


@dataclass(frozen=True)
class Swapped:
    """What swapping the conditions does to the loss of `objective`, image by image.

    `origin`: which of the run's data they are: `evaluate`, `validate` or `train`. `images`: (sample id, number of the
    image in it); `own` and `swapped` `[n]`: the loss of each, a mean over its tokens. `by_time`: for each quarter of
    the timesteps, from least noise to most, the mean of both; empty where nothing is denoised.
    """

    objective: str
    origin: str
    images: tuple[tuple[str, int], ...]
    own: NDArray[np.float64]
    swapped: NDArray[np.float64]
    by_time: tuple[tuple[float, float], ...]

    def summary(self) -> dict[str, Any]:
        """Means, the gap with its standard error and 95 % interval (Student's t, paired), share of images hurt."""
        gaps = self.swapped - self.own
        error = float(gaps.std(ddof=1) / len(gaps) ** 0.5)
        reach = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
        gap = float(gaps.mean())
        return {
            "objective": self.objective, "data": self.origin, "images": len(gaps), "own": float(self.own.mean()),
            "swapped": float(self.swapped.mean()), "gap": gap, "standard_error": error,
            "interval": [gap - reach, gap + reach], "hurt": float((gaps > 0).mean()),
            "by_time": [dict(zip(("own", "swapped"), map(_finite, pair), strict=True)) for pair in self.by_time],
        }  # fmt: skip


def swapped_conditions(
    run: LoadedRun, name: str | None = None, count: int = COUNT, *, seed: int | None = None
) -> Swapped:  # fmt: skip
    """The test for the objective `name` of a run (default: its only one of ROSS), on up to `count` held-out images.

    Of the run's own data: `evaluate`, else `validate`, else what it was trained on. Images that look the same count
    once. An image gets the states of the one before it with the same grid and the same number in its sample, the first
    those of the last: with RGB and depth in a sample, states of depth replace states of depth. Timesteps, noise and
    sampled posteriors are the same on both sides; `seed` (default: the recipe's) gives other ones.

    Raises `UserError` for an objective that is not there or not of ROSS, `RunError` where two images cannot be found.
    """
    name = find_objective(run, name)
    chains: dict[tuple[Any, int], _Chain] = {}
    origins = list[str]()
    for origin, group in islice(_images(run, name, seed), count):
        record = group.outputs.images[group.numbers[0]].record
        chains.setdefault((record.grid, record.index), _Chain(run.learner.objectives[name])).add(group)
        origins.append(origin)
    pairs = [pair for chain in chains.values() for pair in chain.closed()]
    if len(pairs) < 2:
        raise RunError(
            f"{run.run.folder}: its data have {len(origins)} images for objective '{name}' that differ; swapping "
            "conditions needs two of them, at the same place of their samples."
        )
    own, swapped = (np.array([side.total for side in sides]) for sides in zip(*(p.sides for p in pairs), strict=True))
    return Swapped(name, origins[0], tuple(pair.image for pair in pairs), own, swapped, _by_time(pairs))


def find_objective(run: LoadedRun, name: str | None) -> str:
    """The objective of ROSS that is meant. Raises `UserError`."""
    objectives = run.learner.objectives
    ours = [known for known, objective in objectives.items() if isinstance(objective, Reconstruction)]
    if name is None and len(ours) == 1:
        return ours[0]
    if name is not None and name in ours:
        return name
    if not ours:
        raise UserError(f"{run.run.folder} has no objective of ROSS, so there are no conditions to swap.")
    problem = f"is not one of them: {name}" if name is not None else "must be named"
    raise UserError(f"{run.run.folder} has these objectives of ROSS: {', '.join(ours)}. The one to test {problem}.")


@dataclass(frozen=True)
class _Loss:
    """Of one image: a mean over tokens; and the sum and count of each quarter of the timesteps."""

    total: float
    quarters: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Pair:
    image: tuple[str, int]
    sides: tuple[_Loss, _Loss]


class _Chain:
    """Images that lend their states to the next one; of those that were seen only the last states are kept."""

    def __init__(self, objective: Any):
        self._objective = objective
        self._first: Group | None = None
        self._last: Tensor | None = None
        self._pairs: list[_Pair] = []

    def add(self, group: Group) -> None:
        """One image more."""
        if self._last is None:
            self._first = group
        else:
            self._pairs.append(self._pair(group, self._last))
        self._last = group.states

    def closed(self) -> list[_Pair]:
        """All pairs in order, the first image's with the states of the last; none of a single image."""
        if self._first is None or self._last is None or not self._pairs:
            return []
        return [self._pair(self._first, self._last), *self._pairs]

    def _pair(self, group: Group, others: Tensor) -> _Pair:
        record = group.outputs.images[group.numbers[0]].record
        sides = (self._loss(group), self._loss(replace(group, states=others)))
        return _Pair((record.sample_id, record.index), sides)

    @torch.no_grad()
    def _loss(self, group: Group) -> _Loss:
        term: LossTerm = self._objective.head.loss(group)
        sums = [term.metrics.get(f"loss_t{quarter}", (0.0, 0.0)) for quarter in range(QUARTERS)]
        return _Loss(float(term.total) / group.counts[0], tuple((float(total), count) for total, count in sums))


def _images(run: LoadedRun, name: str, seed: int | None) -> Iterator[tuple[str, Group]]:
    """Images that differ and count, each a group of its own, and where they are from."""
    objective: Any = run.learner.objectives[name]
    known = set[bytes]()
    for origin, seen in run.gallery.seen(name, seed):
        with torch.no_grad():
            groups = list(objective.groups(seen.outputs, seen.targets))
        for group in groups:
            for at, number in enumerate(group.numbers):
                pixels = seen.outputs.pixels[number].detach().float().cpu().numpy()
                look = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
                if look in known or not group.counts[at]:
                    continue
                known.add(look)
                states, weights = group.states[at : at + 1], group.weights[at : at + 1]
                yield origin, replace(
                    group, numbers=(number,), states=states, weights=weights, counts=(group.counts[at],)
                )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _by_time(pairs: list[_Pair]) -> tuple[tuple[float, float], ...]:
    """Means of both sides by quarter; NaN where no timestep was drawn from one."""
    sums = np.array([[side.quarters for side in pair.sides] for pair in pairs]).sum(0)  # [side, quarter, sum and count]
    if not sums.any():
        return ()
    with np.errstate(invalid="ignore"):
        means = sums[..., 0] / sums[..., 1]
    return tuple((float(own), float(swapped)) for own, swapped in means.T)
