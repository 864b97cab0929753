"""Learning the codebooks of a residual quantiser: k-means++ on a reservoir, Lloyd steps, moving averages on a stream.

The reservoir (`reservoir` rows a code, from as many pictures as `spread` allows) is kept in memory; k-means++ runs
exactly on it. All rows would not do: each of its K draws passes over them all. With 16 rows a code, 16,384 codes and
rows 1,152 wide the reservoir has 262,144 rows (1.2 GB), and a depth costs K passes over it: 20 TB of memory traffic,
ten seconds on one GPU. Then every row of the stream moves the nearest codes of each depth: 2*Q*K*C = 0.3 GFLOP a row,
so 11 PFLOP for the 36 million rows of 50,000 pictures of 729 tokens: minutes in fp32, as long as the encoder takes.

Draws come from generators of the CPU with seeds of their own, so on a CPU a fit gives the same codebooks bit for bit;
on a GPU the order of additions is not fixed, and sums may differ in their last digits.

Shapes: M rows, Q depths, K codes of a codebook, C width of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from pydantic import Field
from torch import Tensor

from foveate import Options
from foveate.errors import DataError
from foveate_asvr.quantizer import ResidualQuantizer, full, nearest

SETTLE = 0.1
"""The last share of the updates, in which no code is revived any more."""


class FitOptions(Options):
    """How codebooks are learned from the pictures of the stage."""

    images: int = Field(50_000, gt=0, description="Pictures that are looked at; the stage's, again and again.")
    reservoir: int = Field(16, gt=0, description="Rows a code that k-means++ draws from, kept in memory.")
    spread: int = Field(64, gt=0, description="Rows that the reservoir takes of a picture at most.")
    lloyd: int = Field(10, ge=0, description="Steps of Lloyd's algorithm on the reservoir after k-means++.")
    batch_rows: int | None = Field(None, gt=0, description="Rows of an update. Default: one a code, but 4096 at least.")
    decay: float = Field(0.99, ge=0, lt=1, description="Of the moving averages of counts and sums.")
    revive: float = Field(
        0.02, ge=0, lt=1, description="A code that is used less than this share of the mean use gets a row's value."
    )
    check: int = Field(256, gt=0, description="Further pictures that the errors and the use of codes are told of.")


class Codebooks:
    """The state of a fit: counts `[B, K]` and sums `[B, K, C]`, moving averages; B is Q, or 1 of a shared codebook."""

    def __init__(self, quantizer: ResidualQuantizer, options: FitOptions, seed: int):
        self.quantizer, self.options = quantizer, options
        self.random = torch.Generator().manual_seed(seed)
        books = quantizer.codebooks
        self.counts, self.sums = books.new_zeros(books.shape[:2]), torch.zeros_like(books)

    @property
    def batch_rows(self) -> int:
        """Rows of an update."""
        return self.options.batch_rows or max(4096, self.quantizer.size)

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """k-means++ and Lloyd steps, depth by depth, on what the depths before leave of the rows `[M, C]`.

        A shared codebook gets K/Q codes of each depth. Raises `DataError` where there are fewer rows than codes.
        """
        quantizer = self.quantizer
        if len(rows) < quantizer.size:
            raise DataError(
                f"{len(rows)} rows for codebooks of {quantizer.size} codes: raise `fit: {{images: …}}`, "
                "or set a smaller `codebook_size`"
            )
        rest, bounds = full(rows), [round(quantizer.size * d / quantizer.depth) for d in range(quantizer.depth + 1)]
        for depth in range(quantizer.depth):
            which = slice(bounds[depth], bounds[depth + 1]) if quantizer.shared else slice(0, quantizer.size)
            book = quantizer.book(depth)
            if which.stop > which.start:
                seeds = kmeans_plus_plus(rest, which.stop - which.start, self.random)
                book[which] = lloyd(rest, seeds, self.options.lloyd)
            known = book[: which.stop]  # of a shared book: what there is of it
            codes = nearest(rest, known)
            self._absorb(depth, codes, rest, share=self.batch_rows / len(rows))
            rest = rest - known[codes]

    def _absorb(self, depth: int, codes: Tensor, rows: Tensor, share: float = 1.0, keep: float = 1.0) -> None:
        """Adds rows to the averages of a depth, times `share`, after multiplying what was there by `keep`."""
        at = 0 if self.quantizer.shared else depth
        self.counts[at].mul_(keep).add_(torch.bincount(codes, minlength=self.quantizer.size), alpha=share)
        self.sums[at].mul_(keep).index_add_(0, codes, rows, alpha=share)

    @torch.no_grad()
    def update(self, rows: Tensor, revive: bool) -> None:
        """One step of the moving averages: `[M, C]` rows move the codes of every depth; dead codes are revived."""
        quantizer, decay = self.quantizer, self.options.decay
        rows = full(rows)
        codes, left = quantizer.residuals(rows)
        rests = [rows, *left[:-1]]
        for depth, rest in enumerate(rests):
            keep = 1.0 if quantizer.shared and depth else decay
            self._absorb(depth, codes[:, depth], rest, share=1 - decay, keep=keep)
        self._move()
        for at in range(len(self.counts)) if revive else ():
            pool = torch.cat(rests) if quantizer.shared else rests[at]
            lost = left.flatten(0, 1) if quantizer.shared else left[at]
            self._revive(at, pool, lost.square().sum(1))

    def _move(self) -> None:
        """Every code to the mean of what it stands for; one that stands for nothing stays."""
        used = self.counts > 0
        means = self.sums / self.counts.clamp_min(torch.finfo(self.counts.dtype).tiny)[..., None]
        self.quantizer.codebooks.copy_(torch.where(used[..., None], means, self.quantizer.codebooks))

    def _revive(self, at: int, rows: Tensor, errors: Tensor) -> None:
        """Codes that are hardly used become rows, drawn by the squared error that they have now."""
        mean = self.counts[at].mean()
        dead = (self.counts[at] < self.options.revive * mean).nonzero().flatten()
        if not len(dead) or not float(errors.sum()) > 0:
            return
        drawn = torch.rand(len(dead), generator=self.random, dtype=torch.float64)
        seeds = rows[_pick(errors, drawn.to(errors.device))]
        self.quantizer.codebooks[at, dead] = seeds.to(self.quantizer.codebooks.dtype)
        self.counts[at, dead] = mean
        self.sums[at, dead] = mean * self.quantizer.codebooks[at, dead]


def kmeans_plus_plus(rows: Tensor, count: int, random: torch.Generator, trials: int | None = None) -> Tensor:
    """`count` of the rows `[M, C]`, each drawn by its squared distance to the nearest one drawn before.

    Of `trials` draws (default: 2 + ln `count`) the one that leaves the smallest sum of distances is kept; together they
    cost one pass over the rows.
    """
    trials = trials or 2 + int(math.log(count))
    drawn = torch.rand(count, trials, generator=random, dtype=torch.float64).to(rows.device)
    chosen, shifted = torch.empty_like(rows[:count]), rows - rows.mean(0)
    squares = shifted.square().sum(1)
    distances = torch.full_like(squares, torch.inf)
    for number in range(count):
        at = _pick(distances if number else torch.ones_like(squares), drawn[number])
        candidates = shifted.index_select(0, at)
        apart = torch.addmm(squares[:, None] + candidates.square().sum(1), shifted, candidates.T, alpha=-2)
        apart = torch.minimum(apart.clamp_min_(0), distances[:, None])
        best = apart.sum(0).argmin().view(1)
        distances = apart.index_select(1, best).squeeze(1)
        kept = at.index_select(0, best)
        distances.index_fill_(0, kept, 0.0)
        chosen[number] = rows.index_select(0, kept).squeeze(0)
    return chosen


def _pick(weights: Tensor, drawn: Tensor) -> Tensor:
    """Indices drawn by weights `[M]`, one for each of the uniform numbers `drawn`; without weights any index."""
    steps = weights.double().cumsum(0)
    steps = torch.where(steps[-1] > 0, steps, torch.arange(1, len(steps) + 1, device=steps.device).double())
    return torch.searchsorted(steps, drawn * steps[-1], right=True).clamp_max(len(weights) - 1)


def lloyd(rows: Tensor, book: Tensor, steps: int) -> Tensor:
    """Lloyd's algorithm: `steps` times, each vector of the book becomes the mean of the rows nearest to it."""
    for _ in range(steps):
        codes = nearest(rows, book)
        counts = torch.bincount(codes, minlength=len(book))
        means = torch.zeros_like(book).index_add_(0, codes, rows) / counts.clamp_min(1)[:, None]
        moved = torch.where(counts[:, None] > 0, means, book)
        if torch.equal(moved, book):
            break
        book = moved
    return book


def fit_codebooks(
    quantizer: ResidualQuantizer, pictures: Iterable[Tensor], options: FitOptions, seed: int
) -> dict[str, float]:
    """Learns the codebooks from `pictures`, the rows of one picture `[N, C]` each; tells what `measure` does.

    Raises `DataError` where `options.images` pictures have fewer rows than a codebook has codes.
    """
    stream, books = iter(pictures), Codebooks(quantizer, options, seed)
    first, seen = _reservoir(stream, options, options.reservoir * quantizer.size, books.random)
    books.start(first)
    left = max(0, options.images - seen)
    for rows, share in _gathered(stream, left, books.batch_rows):
        books.update(rows, revive=share < 1 - SETTLE)
    check = [rows for _, rows in zip(range(options.check), stream, strict=False)]
    return measure(quantizer, torch.cat(check))


def _reservoir(
    stream: Iterator[Tensor], options: FitOptions, wanted: int, random: torch.Generator
) -> tuple[Tensor, int]:
    """Up to `wanted` rows, at most `spread` of a picture, and of how many pictures they are.

    Where `images` pictures do not fill it at that rate, more is taken of each.
    """
    spread = max(options.spread, math.ceil(wanted / options.images))
    found, rows_found, seen = list[Tensor](), 0, 0
    while rows_found < wanted and seen < options.images:
        rows = full(next(stream))
        order = torch.randperm(len(rows), generator=random)[: min(spread, wanted - rows_found)]
        found.append(rows[order.sort().values.to(rows.device)])
        rows_found, seen = rows_found + len(found[-1]), seen + 1
    return torch.cat(found), seen


def _gathered(stream: Iterator[Tensor], images: int, batch_rows: int) -> Iterator[tuple[Tensor, float]]:
    """The rows of `images` pictures, `batch_rows` or a few more at a time, and which share of them is done."""
    waiting, rows_waiting = list[Tensor](), 0
    for number in range(1, images + 1):
        waiting.append(next(stream))
        rows_waiting += len(waiting[-1])
        if rows_waiting >= batch_rows or number == images:
            yield torch.cat(waiting), number / images
            waiting, rows_waiting = [], 0


@torch.no_grad()
def measure(quantizer: ResidualQuantizer, rows: Tensor) -> dict[str, float]:
    """What a fit is judged by, on rows `[M, C]`, by depth d from 1.

    `error/d`: what is left after depth d, as a share of the rows' variance. `perplexity/d`: exp of the entropy of the
    codes. `used/d`: the share of codes that occur. `guess/d`: how often the most frequent code occurs, which is the
    accuracy of always guessing it.
    """
    rows = full(rows)
    codes, left = quantizer.residuals(rows)
    spread = float((rows - rows.mean(0)).square().sum()) or 1.0
    told = {}
    for depth in range(quantizer.depth):
        share = torch.bincount(codes[:, depth], minlength=quantizer.size).double() / max(1, len(codes))
        told[f"error/{depth + 1}"] = float(left[depth].square().sum()) / spread
        told[f"perplexity/{depth + 1}"] = math.exp(float(torch.special.entr(share).sum()))
        told[f"used/{depth + 1}"] = float((share > 0).double().mean())
        told[f"guess/{depth + 1}"] = float(share.max())
    return told
