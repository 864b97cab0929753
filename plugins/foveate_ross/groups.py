"""Images of one grid, stacked: what a head of ROSS sees of a micro-batch.

Shapes: I images of the group, N visual tokens of each, D width of the LLM, C of a target row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate import Grid, Outputs, Targets
from foveate.errors import ModelError


@dataclass(frozen=True)
class Group:
    """Images of one grid. `numbers`: which of `outputs.images` they are; `states` `[I, N, D]`: their conditions.

    `weights` `[I, N]`: what each token counts; `counts`: their sum by image, known without a look at the device.
    """

    outputs: Outputs
    targets: Targets
    grid: Grid
    numbers: tuple[int, ...]
    states: Tensor
    weights: Tensor
    counts: tuple[float, ...]

    def stack(self, name: str) -> Tensor:
        """The entry `name` of the images' targets, `[I, …]`."""
        return torch.stack([self.targets[number][name] for number in self.numbers]).to(self.states.device)

    @cached_property
    def target(self) -> Tensor:
        """The target rows as the teacher records them, `[I, N, C]`; of a posterior its mean."""
        rows = self.stack("mean" if self._posterior else next(iter(self._record)))  # a teacher's first entry is rows
        if rows.shape[1] != self.states.shape[1]:
            raise ModelError(f"the teacher made {rows.shape[1]} rows of an image with {self.states.shape[1]} tokens")
        return rows.to(self.states.dtype)

    @cached_property
    def clean(self) -> Tensor:
        """The target rows, `[I, N, C]`; a posterior is sampled, by each image's own generator, once for all draws."""
        if not self._posterior:
            return self.target
        spread = (0.5 * self.stack("logvar").to(self.states.dtype)).exp()
        return self.target + spread * self.randn("posterior", *self.target.shape[1:])

    @property
    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = self.targets[self.numbers[0]]
        return record

    @property
    def _posterior(self) -> bool:
        return {"mean", "logvar"} <= self._record.keys()

    def generators(self, name: str) -> list[torch.Generator]:
        """Each image's own."""
        return [self.outputs.generator(number, name) for number in self.numbers]

    def randn(self, name: str, *shape: int) -> Tensor:
        """Normal noise `[I, *shape]`, from each image's own generator."""
        return self.moved(torch.stack([torch.randn(shape, generator=one) for one in self.generators(name)]))

    def moved(self, made: Tensor) -> Tensor:
        """What was made on the CPU, where the states are and in their dtype; a GPU need not be waited for."""
        pinned = made.pin_memory() if self.states.is_cuda else made
        return pinned.to(self.states, non_blocking=True)


def groups(
    outputs: Outputs, targets: Targets, states: Tensor, weights: Tensor, counts: Sequence[float]
) -> Iterator[Group]:
    """The images of a micro-batch by their grids.

    `states` `[sum of N, D]` and `weights` `[sum of N]`: of all tokens, image after image; `counts`: an image each.
    """
    grids: dict[Grid, list[int]] = {}
    for number, image in enumerate(outputs.images):
        grids.setdefault(image.record.grid, []).append(number)
    for grid, numbers in grids.items():
        mine = tuple(counts[number] for number in numbers)
        stacked, weighing = _rows(states, outputs, numbers), _rows(weights, outputs, numbers)
        yield Group(outputs, targets, grid, tuple(numbers), stacked, weighing, mine)


def _rows(flat: Tensor, outputs: Outputs, numbers: Sequence[int]) -> Tensor:
    """Of values at all tokens those of some images, `[I, N, …]`."""
    if len(numbers) == len(outputs.images):  # one grid, which is the rule: nothing is copied
        return flat.unflatten(0, (len(numbers), -1))
    parts = flat.split([image.record.grid[0] * image.record.grid[1] for image in outputs.images])
    return torch.stack([parts[number] for number in numbers])
