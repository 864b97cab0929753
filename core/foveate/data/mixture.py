"""Mixing sources: which sample stands at a position of an epoch, as a pure function of (seed, epoch, position)."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from foveate.data.dataset import ConversationDataset
from foveate.errors import DataError

_SUBSET, _EXTRA, _ORDER = range(3)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set, how often it appears in an epoch, and how many of its samples are used at most.

    `objectives`: those that apply to its images; None: all that are active.
    """

    dataset: ConversationDataset
    weight: float = 1.0
    max_samples: int | None = None
    name: str = "data"
    objectives: tuple[str, ...] | None = None


class Mixture:
    """The samples of an epoch in their order; without `shuffle`, the sources' own, one after the other.

    A source of weight 2.5 appears two and a half times an epoch: the half is drawn anew in each, without replacement,
    `max_samples` once for all epochs.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, shuffle: bool = True):
        self.sources, self.seed, self.shuffle = tuple(sources), seed, shuffle
        self._offsets = [0, *accumulate(len(source.dataset) for source in sources)]
        self._length = len(_order(self, 0))
        if not self._length:
            raise DataError(f"there is no sample in the data: {[source.name for source in sources]}")

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self._length

    def sample_at(self, epoch: int, position: int) -> tuple[int, int]:
        """The source's number and the index in its data set."""
        item = int(_order(self, epoch)[position])
        source = bisect_right(self._offsets, item) - 1
        return source, item - self._offsets[source]


@lru_cache(maxsize=4)
def _order(mixture: Mixture, epoch: int) -> np.ndarray:
    """What stands at each position of the epoch, numbered through all sources."""
    parts = [np.empty(0, dtype=np.int64)]
    for number, source in enumerate(mixture.sources):
        size, seed = len(source.dataset), mixture.seed
        most = size if source.max_samples is None else min(size, source.max_samples)
        drawn = np.random.default_rng((seed, _SUBSET, number)).permutation(size)[:most] if most < size else range(size)
        kept = np.sort(np.array(drawn, dtype=np.int64)) + mixture._offsets[number]
        extra = np.random.default_rng((seed, _EXTRA, number, epoch)).permutation(kept)
        parts += [kept] * int(source.weight) + [np.sort(extra[: round(source.weight % 1 * len(kept))])]
    order = np.concatenate(parts)
    return np.random.default_rng((mixture.seed, _ORDER, epoch)).permutation(order) if mixture.shuffle else order
