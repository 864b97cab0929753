"""Mixing: weights, limits and shuffling as a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from foveate.data.mixture import Mixture, Source
from foveate.errors import DataError


def order(mixture: Mixture, epoch: int) -> list[tuple[int, int]]:
    return [mixture.sample_at(epoch, position) for position in range(len(mixture))]


def make(listed: Any, *sources: tuple[int, float, int | None], **options: Any) -> Mixture:
    return Mixture([Source(listed([None] * size), weight, most) for size, weight, most in sources], **options)


def test_an_epoch_holds_each_sample_as_often_as_its_weight_says(listed: Any) -> None:
    mixture = make(listed, (10, 1.0, None), (8, 2.5, None), (6, 0.5, None))
    for epoch in range(3):
        counts = Counter(order(mixture, epoch))
        assert {counts[0, index] for index in range(10)} == {1}
        assert sorted(counts[1, index] for index in range(8)) == [2] * 4 + [3] * 4
        assert sorted(counts[2, index] for index in range(6)) == [0] * 3 + [1] * 3
        assert sum(counts.values()) == len(mixture) == 10 + 20 + 3


def test_fractions_are_drawn_anew_and_limits_once(listed: Any) -> None:
    mixture = make(listed, (100, 0.5, None), (100, 1.0, 20))
    halves = [{index for source, index in order(mixture, epoch) if source == 0} for epoch in (0, 1)]
    limited = [{index for source, index in order(mixture, epoch) if source == 1} for epoch in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 50 and halves[0] != halves[1]
    assert limited[0] == limited[1] and len(limited[0]) == 20 and limited[0] != set(range(20))


def test_the_order_depends_on_seed_and_epoch_alone(listed: Any) -> None:
    sizes = ((30, 1.5, None), (20, 1.0, 10))
    first, again, other = (make(listed, *sizes, seed=seed) for seed in (1, 1, 2))
    orders = [order(first, epoch) for epoch in range(5)]
    assert [again.sample_at(epoch, 7) for epoch in (4, 0, 3, 1, 2)] == [orders[epoch][7] for epoch in (4, 0, 3, 1, 2)]
    assert len({tuple(entry) for entry in orders}) == 5 and order(other, 0) != orders[0]


def test_without_shuffling_sources_keep_their_order(listed: Any) -> None:
    mixture = make(listed, (3, 1.0, None), (2, 2.0, None), shuffle=False)
    assert order(mixture, 0) == order(mixture, 1) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 0), (1, 1)]


def test_no_samples_is_an_error(listed: Any) -> None:
    with pytest.raises(DataError, match="no sample in the data"):
        Mixture([])
    with pytest.raises(DataError, match="no sample in the data"):
        make(listed, (5, 0.0, None), (0, 1.0, None))
