"""Random blocks of visual tokens as in I-JEPA: one of context, four of targets."""

import functools
from itertools import product

import torch

CONTEXT, TARGETS, REST = 0, (1, 2, 3, 4), 5
"""A token's group: in the context block, in a target block, in neither."""


@functools.cache
def shapes(grid: tuple[int, int], target: bool) -> list[tuple[int, int]]:
    """Blocks (height, width) of a share of the grid's area within the bounds, and of height over width within bounds.

    A small grid may have none: then those that miss the area, and next the aspect, by the smallest factor.
    """
    own = grid[0] / grid[1]
    area, aspect = ((0.15, 0.2), (0.75, 1.5)) if target else ((0.85, 1.0), (own, own))

    def miss(value: float, bounds: tuple[float, float]) -> float:
        return max(bounds[0] / value, value / bounds[1], 1.0)

    every = product(range(1, grid[0] + 1), range(1, grid[1] + 1))
    missed = {(h, w): (miss(h * w / (grid[0] * grid[1]), area), miss(h / w, aspect)) for h, w in every}
    least = min(missed.values())
    return [shape for shape, by in missed.items() if by == least]


def draw_groups(grid: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """`[h*w]` int64, the group of each token; a token of several targets is of the last of them."""
    groups = torch.full(grid, REST)
    for group in (CONTEXT, *TARGETS):
        fitting = shapes(grid, group in TARGETS)
        height, width = fitting[int(torch.randint(len(fitting), (), generator=generator))]
        top = int(torch.randint(grid[0] - height + 1, (), generator=generator))
        left = int(torch.randint(grid[1] - width + 1, (), generator=generator))
        groups[top : top + height, left : left + width] = group
    return groups.flatten()
