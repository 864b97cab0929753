"""Mixing sources: which sample stands at a position of an epoch, as a pure function of (seed, epoch, position)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from foveate.data.dataset import ConversationDataset
from foveate.errors import DataError

_SUBSET, _EXTRA, _ORDER = range(3)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set, how often it appears in an epoch, and how many of its samples are used at most."""

    dataset: ConversationDataset
    weight: float = 1.0
    max_samples: int | None = None
    name: str = "data"


class Mixture:
    """The samples of an epoch in their order. A source of weight 2.5 appears two and a half times an epoch.

    `max_samples` is drawn once, the same samples in every epoch; the fraction of a weight is drawn anew in each,
    without replacement. Without `shuffle` the sources follow each other in their own order.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, shuffle: bool = True):
        self.sources, self.seed, self.shuffle = tuple(sources), seed, shuffle
        self._offsets = [0, *accumulate(len(source.dataset) for source in sources)]
        self._kept = [self._subset(number) for number in range(len(sources))]
        self._orders: dict[int, np.ndarray] = {}
        self._length = len(self._order(0))
        if not self._length:
            raise DataError(f"there is no sample in the data: {[source.name for source in sources]}")

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self._length

    def sample_at(self, epoch: int, position: int) -> tuple[int, int]:
        """The source's number and the index in its data set."""
        item = int(self._order(epoch)[position])
        source = bisect_right(self._offsets, item) - 1
        return source, item - self._offsets[source]

    def _subset(self, number: int) -> np.ndarray:
        source, size = self.sources[number], len(self.sources[number].dataset)
        kept = np.arange(size)
        if source.max_samples is not None and source.max_samples < size:
            drawn = np.random.default_rng((self.seed, _SUBSET, number)).permutation(size)
            kept = np.sort(drawn[: source.max_samples])
        return kept + self._offsets[number]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            parts = []
            for number, (source, kept) in enumerate(zip(self.sources, self._kept, strict=True)):
                whole = int(source.weight)
                extra = np.random.default_rng((self.seed, _EXTRA, number, epoch)).permutation(kept)
                parts += [kept] * whole + [np.sort(extra[: round((source.weight - whole) * len(kept))])]
            order = np.concatenate([np.empty(0, dtype=np.int64), *parts])
            if self.shuffle:
                order = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(order)
            self._orders = {epoch: order, **dict(list(self._orders.items())[:1])}  # two epochs meet in the prefetch
        return self._orders[epoch]
