"""Matching visual tokens with rows of a pool: the exact optimum, an image at a time, images in parallel threads.

Shapes: S tokens of one image, P rows of the pool, D width of the LLM.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Cost = Literal["euclidean", "cosine"]
Assignment = Literal["hungarian", "nearest"]


class NotFinite(Exception):
    """The costs of an image are not finite; its number among those that were given."""


@dataclass(frozen=True)
class Matches:
    """`rows` `[all tokens]` int64: the pool's row of each; `costs` of these pairs; `seconds` that the solver took.

    The seconds of several threads count once, and the costs' own computation and transfer not at all.
    """

    rows: Tensor
    costs: Tensor
    seconds: float


@torch.no_grad()
def pairwise_costs(tokens_SD: Tensor, pool_PD: Tensor, cost: Cost) -> Tensor:
    """`[S, P]`: Euclidean distances, or 1 - cosine; one matrix product, in the tokens' dtype."""
    if cost == "cosine":
        return 1 - F.normalize(tokens_SD, dim=-1) @ F.normalize(pool_PD, dim=-1).T
    # distances do not depend on the origin; at the pool's mean the squares are small, and fewer digits cancel
    origin_D = pool_PD.mean(0)
    tokens_SD, pool_PD = tokens_SD - origin_D, pool_PD - origin_D
    squares_SP = torch.addmm(pool_PD.square().sum(-1), tokens_SD, pool_PD.T, alpha=-2)
    return squares_SP.add_(tokens_SD.square().sum(-1, keepdim=True)).clamp_(min=0).sqrt_()


@torch.no_grad()
def match(costs: Tensor, sizes: Sequence[int], assignment: Assignment = "hungarian") -> Matches:
    """Matches the tokens of each image by itself.

    `costs` `[sum of sizes, P]`, on any device; `sizes`: tokens of each image. `hungarian`: as `solve`; each image is
    solved as soon as its costs have reached the host, in threads, for scipy's solver releases Python's lock. `nearest`:
    each token gets the row of least cost, whoever else has it. Raises `NotFinite`.
    """
    parts = costs.split(list(sizes))
    if assignment == "nearest":
        sums = torch.stack([part.sum() for part in parts]).tolist()
        _check_finite(sums)
        started = time.perf_counter()
        best, rows = costs.min(-1)
        return Matches(rows, best, time.perf_counter() - started)
    jobs = [_threads().submit(_solved, *_to_host(part)) for part in parts]
    solved = [job.result() for job in jobs]
    _check_finite([total for _, total, _, _ in solved])
    rows = torch.cat([torch.from_numpy(rows_S) for rows_S, *_ in solved]).to(costs.device)
    seconds = max(ended for *_, ended in solved) - min(begun for *_, begun, _ in solved)
    return Matches(rows, costs.gather(1, rows[:, None])[:, 0], seconds)


def solve(costs_SP: np.ndarray) -> np.ndarray:
    """`[S]` int64, the column of each row, of least total cost where no column is used more than ⌈S/P⌉ times.

    So no column is used twice where there are enough of them. Exact: scipy's shortest augmenting paths. Where many rows
    want the same few columns, the solver is slow in proportion to all columns, and gets only those that are among the S
    nearest of some row: of these each row can always have one, so the best of all assignments is among them.
    """
    rows, columns = costs_SP.shape
    times = -(-rows // columns)
    if times > 1:  # equal columns side by side: the solver visits neighbours in order
        found: np.ndarray = linear_sum_assignment(np.repeat(costs_SP, times, 1))[1]
        return found // times
    if columns >= 2 * rows and len(np.unique(costs_SP.argmin(1))) < rows / 10:
        farthest_S1 = np.partition(costs_SP, rows - 1, axis=1)[:, rows - 1 : rows]
        near = np.flatnonzero((costs_SP <= farthest_S1).any(0))
        return near[linear_sum_assignment(costs_SP[:, near])[1]]
    return linear_sum_assignment(costs_SP)[1]


def _solved(costs: Tensor, arrived: torch.Event | None) -> tuple[np.ndarray, float, float, float]:
    """The columns, the sum of all costs, and when the work began and ended."""
    if arrived is not None:
        arrived.synchronize()
    begun = time.perf_counter()
    costs_SP = costs.numpy()
    total = float(costs_SP.sum())
    columns = solve(costs_SP) if np.isfinite(total) else np.zeros(len(costs_SP), dtype=np.int64)
    return columns, total, begun, time.perf_counter()


def _to_host(costs: Tensor) -> tuple[Tensor, torch.Event | None]:
    """The costs in page-locked memory of the host, and the event after which they are there; nobody waits here."""
    if costs.device.type == "cpu":
        return costs, None
    host = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True)
    host.copy_(costs, non_blocking=True)
    arrived = torch.Event(costs.device)
    arrived.record()
    return host, arrived


def _check_finite(sums: Sequence[float]) -> None:
    if bad := [number for number, total in enumerate(sums) if not np.isfinite(total)]:
        raise NotFinite(bad[0])


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One pool of threads for the process: its share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(max(1, cores // processes), thread_name_prefix="victor-matching")
