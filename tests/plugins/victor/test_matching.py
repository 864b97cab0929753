"""The matching is the optimum of scipy's full solve, whatever the costs; no row is used more often than it must be."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from foveate_victor.matching import NotFinite, match, pairwise_costs, solve

SEED = random.randrange(1 << 30)


def points(rng: np.random.Generator, kind: str, tokens: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rows `[., 12]` of a kind that is easy or hard to match."""
    first, second = rng.standard_normal((tokens, 12)), rng.standard_normal((rows, 12))
    common = rng.standard_normal(12)
    if kind == "clustered":
        centres = 3 * rng.standard_normal((3, 12))
        first = first * 0.1 + centres[rng.integers(3, size=tokens)]
        second = second + centres[rng.integers(3, size=rows)]
    elif kind == "parallel":
        first, second = common + 0.01 * first, common + second
    elif kind == "one token":
        first = np.repeat(first[:1], tokens, 0)
    elif kind == "one row":
        second = np.repeat(second[:1], rows, 0)
    elif kind == "duplicates":
        first, second = first[rng.integers(tokens, size=tokens)], first[rng.integers(tokens, size=rows)]
    elif kind == "ties":
        first, second = rng.integers(2, size=first.shape) * 1.0, rng.integers(2, size=second.shape) * 1.0
    elif kind == "released":
        first, second = first / np.linalg.norm(first, axis=1, keepdims=True), 10 * second
    return first, second


KINDS = ("random", "clustered", "parallel", "one token", "one row", "duplicates", "ties", "released")


@pytest.mark.parametrize("kind", KINDS)
def test_total_cost_is_that_of_the_full_solve(kind: str) -> None:
    """1,000 cases over all kinds, of every proportion of tokens to rows."""
    rng = np.random.default_rng(SEED)
    for _ in range(125):
        tokens, rows = int(rng.integers(1, 40)), int(rng.choice([1, 2, 7, 20, 60, 150]))
        first, second = points(rng, kind, tokens, rows)
        metric = str(rng.choice(["euclidean", "cosine"]))
        costs = np.nan_to_num(cdist(first, second, metric))  # two zero vectors have no cosine
        times = -(-tokens // rows)
        every = np.repeat(costs, times, 1)
        best = every[linear_sum_assignment(every)].sum()
        found = solve(costs)
        told = f"seed {SEED}, {tokens} tokens, {rows} rows, {metric}"
        assert costs[np.arange(tokens), found].sum() == pytest.approx(best, rel=1e-12, abs=1e-12), told
        assert max(Counter(found.tolist()).values()) <= times, told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", ["euclidean", "cosine"])
def test_images_are_matched_by_themselves(kind: str, cost: Any) -> None:
    """Several images at once, costs of our own in float64: totals of scipy's full solve on scipy's distances."""
    rng = np.random.default_rng(SEED)
    sizes = [5, 31, 1, 17]
    first, second = points(rng, kind, sum(sizes), 64)
    if kind == "ties":
        first, second = first + 0.5, second + 0.5  # a cosine needs a direction
    costs = pairwise_costs(torch.from_numpy(first), torch.from_numpy(second), cost)
    expected = cdist(first, second, cost)
    # a distance of zero comes out as the root of a rounding error
    torch.testing.assert_close(costs, torch.from_numpy(expected), rtol=1e-9, atol=1e-6)
    found = match(costs, sizes)
    for rows, paid, part in zip(
        found.rows.split(sizes), found.costs.split(sizes), np.split(expected, np.cumsum(sizes)[:-1]), strict=True
    ):
        assert len(set(rows.tolist())) == len(rows)
        assert float(paid.sum()) == pytest.approx(part[linear_sum_assignment(part)].sum(), abs=1e-6 * len(rows))
        torch.testing.assert_close(paid, torch.from_numpy(part)[torch.arange(len(rows)), rows], rtol=1e-9, atol=1e-6)
    assert found.seconds > 0


def test_nearest_is_the_least_cost_of_each_token() -> None:
    costs = torch.from_numpy(np.random.default_rng(SEED).random((40, 9)))
    found = match(costs, [25, 15], "nearest")
    assert found.rows.tolist() == [int(np.argmin(row)) for row in costs.numpy()]
    assert found.costs.tolist() == costs.numpy().min(1).tolist()


def test_distances_keep_their_digits_where_all_is_nearly_parallel() -> None:
    """In float32, against float64: tokens 1e-3 apart around a common vector of norm 1."""
    generator = torch.Generator().manual_seed(SEED)
    common = torch.randn(256, generator=generator, dtype=torch.float64)
    tokens, pool = (
        torch.nn.functional.normalize(
            common + 1e-3 * torch.randn(size, 256, generator=generator, dtype=torch.float64), dim=-1
        )
        for size in (50, 80)
    )
    expected = torch.from_numpy(cdist(tokens.float().double().numpy(), pool.float().double().numpy()))
    found = pairwise_costs(tokens.float(), pool.float(), "euclidean").double()
    assert float(((found - expected) / expected).abs().max()) < 1e-3


@pytest.mark.parametrize("assignment", ["hungarian", "nearest"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_image_that_is_not_finite_is_named(assignment: Any, value: float) -> None:
    tokens = torch.randn(30, 6)
    tokens[17, 2] = value
    costs = pairwise_costs(tokens, torch.randn(40, 6), "euclidean")
    with pytest.raises(NotFinite) as raised:
        match(costs, [10, 10, 10], assignment)
    assert raised.value.args == (1,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("assignment", ["hungarian", "nearest"])
def test_costs_of_an_accelerator_are_matched_as_those_of_the_host(assignment: Any) -> None:
    costs = torch.rand(300, 500, dtype=torch.float64)
    here, there = (match(where, [100, 200], assignment) for where in (costs, costs.cuda()))
    assert there.rows.is_cuda and torch.equal(there.rows.cpu(), here.rows)
    assert torch.equal(there.costs.cpu(), here.costs)
