"""Blocks lie where I-JEPA's may: areas and aspects within bounds, everywhere on the grid, and a context is left."""

import random

import pytest
import torch
from foveate_jarvis.blocks import CONTEXT, REST, TARGETS, draw_groups, shapes

SMALL = [(3, 3), (4, 4), (6, 6), (2, 7), (9, 4)]
RANDOM = [(random.randint(8, 30), random.randint(8, 30)) for _ in range(6)]


@pytest.mark.parametrize("grid", [*SMALL, *RANDOM, (24, 24), (27, 27)])
def test_shapes_are_within_the_bounds_and_none_is_missing(grid: tuple[int, int]) -> None:
    """Against every block of the grid, counted in whole numbers; a grid without any gets those of the nearest area."""
    rows, columns = grid
    every = {(h, w) for h in range(1, rows + 1) for w in range(1, columns + 1)}
    areas = {(h, w) for h, w in every if 15 * rows * columns <= 100 * h * w <= 20 * rows * columns}
    fitting = {(h, w) for h, w in areas if 3 * w <= 4 * h and 2 * h <= 3 * w}
    found = set(shapes(grid, True))
    assert found == fitting if fitting else found <= (areas or every) and found
    context = {(h, w) for h, w in every if 85 * rows * columns <= 100 * h * w and h * columns == w * rows}
    assert set(shapes(grid, False)) == context, "a context block has the shape of the grid"


def test_bounds_hold_on_all_but_the_smallest_grids() -> None:
    for grid in [(6, 6), (24, 24), (27, 27)]:
        for height, width in shapes(grid, True):
            assert 0.15 <= height * width / (grid[0] * grid[1]) <= 0.2 and 0.75 <= height / width <= 1.5


@pytest.mark.parametrize("grid", [*SMALL, *RANDOM])
def test_groups_are_blocks_and_a_context_is_left(grid: tuple[int, int]) -> None:
    """The last target is whole; what is neither lies outside of one rectangle of context; every edge is reached."""
    generator, reached, largest = torch.Generator().manual_seed(random.getrandbits(32)), torch.zeros(grid).bool(), 0.0
    for _ in range(300):
        groups = draw_groups(grid, generator)
        assert groups.shape == (grid[0] * grid[1],) and groups.dtype == torch.int64
        assert set(groups.tolist()) <= {CONTEXT, *TARGETS, REST} and (groups == CONTEXT).any()
        groups = groups.reshape(grid)
        inside, last = groups == CONTEXT, groups == TARGETS[-1]
        assert _box(last) in shapes(grid, True) and last.sum() == _box(last)[0] * _box(last)[1]
        for target in TARGETS:
            assert (groups == target).sum() <= max(h * w for h, w in shapes(grid, True))
        lines = [inside.any(1), inside.any(0)]
        filled = torch.outer(*[_filled(line) for line in lines])
        assert not (groups[filled] == REST).any(), "the context block is a rectangle"
        reached |= last
        largest = max(largest, float((groups == REST).float().mean()))
    assert all(edge.any() for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1]))
    assert largest <= 0.15


def test_the_same_generator_draws_the_same_blocks() -> None:
    seed = random.getrandbits(32)
    first, again = (draw_groups((24, 24), torch.Generator().manual_seed(seed)) for _ in range(2))
    other = draw_groups((24, 24), torch.Generator().manual_seed(seed + 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def _box(cells: torch.Tensor) -> tuple[int, int]:
    """Height and width of the rectangle around the true cells."""
    rows, columns = cells.any(1).nonzero(), cells.any(0).nonzero()
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def _filled(line: torch.Tensor) -> torch.Tensor:
    """True from the first true entry to the last."""
    at = line.nonzero()
    return (torch.arange(len(line)) >= at.min()) & (torch.arange(len(line)) <= at.max())
