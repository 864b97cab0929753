"""Steps: the same samples whatever the ranks, workers and budget; exact resume; bad samples as the recipe says."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate.data.dataset import SampleError
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules
from foveate.data.steps import StageData, StepBatches
from foveate.errors import DataError
from foveate.types import Conversation

Talk = Callable[..., Conversation]
Stage = Callable[..., StageData]


@pytest.fixture
def rows(talk: Talk, digits: list[Image.Image]) -> list[Any]:
    """Thirty samples of every kind: text-only, one image, two, image-only, with a target."""
    kinds: list[Callable[[int], Conversation]] = [
        lambda n: talk("count", "one " * (n % 5 + 1), id=f"text{n}"),
        lambda n: talk("<image>\nWhat?", f"It is {n}", images=digits[n % 16 :][:1], id=f"one{n}"),
        lambda n: talk("<image><image>", "two", "And?", "no" * (n % 7 + 1), images=digits[:2], id=f"two{n}"),
        lambda n: talk(images=digits[n % 16 :][:1], id=f"only{n}"),
        lambda n: talk("<image>", "see", images=digits[:1], targets=digits[1:2], id=f"target{n}"),
    ]
    return [kinds[number % 5](number) for number in range(30)]


@pytest.fixture
def stage(rows: list[Any], listed: Any, make_rules: Callable[..., SampleRules]) -> Stage:
    def make(data: list[Any] | None = None, rules: dict[str, Any] | None = None, **options: Any) -> StageData:
        sources = [Source(listed(data or rows), name="rows")]
        return StageData(sources, make_rules(**(rules or {})), **{"batch_size": 8, "seed": 3, **options})

    return make


def ids(step: StepBatches) -> list[str]:
    return [name for batch in step.batches if not batch.dummy for name in batch.sample_ids]


def same(left: StepBatches, right: StepBatches) -> bool:
    if (left.counts, left.skipped, len(left.batches)) != (right.counts, right.skipped, len(right.batches)):
        return False
    return all(
        torch.equal(value, vars(other)[name]) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        for batch, other in zip(left.batches, right.batches, strict=True)
        for name, value in vars(batch).items()
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("budget", [40, 10_000])
def test_each_sample_once_for_any_number_of_ranks(world: int, budget: int, stage: Stage, rows: list[Any]) -> None:
    ranks = [list(stage(rank=rank, world=world, budget=budget, epochs=2).steps()) for rank in range(world)]
    alone = list(stage(epochs=2).steps())
    assert len(alone) == 8 and [len(ids(step)) for step in alone] == [8, 8, 8, 6] * 2
    for number, steps in enumerate(zip(*ranks, strict=True)):
        assert sorted(chain.from_iterable(map(ids, steps))) == sorted(ids(alone[number]))
        assert len({len(step.batches) for step in steps}) == 1
        for name in ("samples", "images", "tokens"):
            assert sum(getattr(step, name) for step in steps) == getattr(alone[number], name)
        assert sum(step.counts["text"] for step in steps) == alone[number].counts["text"]
    for epoch in (alone[:4], alone[4:]):
        assert Counter(chain.from_iterable(map(ids, epoch))) == Counter(row.id for row in rows)
    assert [ids(step) for step in alone[:4]] != [ids(step) for step in alone[4:]]


def test_counts_are_those_of_the_batches(stage: Stage) -> None:
    for step in stage(budget=60).steps():
        assert step.counts == {"text": sum(batch.target_ids.numel() for batch in step.batches)}
        assert step.images == sum(len(batch.images) for batch in step.batches if not batch.dummy)
        assert step.tokens == sum(sum(batch.lengths) for batch in step.batches if not batch.dummy)
        assert all(sum(batch.lengths) <= 60 or len(batch.lengths) == 1 for batch in step.batches)


def test_a_rank_without_samples_gets_a_dummy(stage: Stage) -> None:
    steps = [next(iter(stage(batch_size=2, rank=rank, world=4).steps())) for rank in range(4)]
    assert [len(ids(step)) for step in steps] == [1, 1, 0, 0]
    assert [step.batches[0].dummy for step in steps] == [False, False, True, True]
    assert steps[3].counts == {"text": 0.0} and (steps[3].samples, steps[3].images, steps[3].tokens) == (0, 0, 0)


def test_workers_change_nothing_and_can_be_asked_again(stage: Stage) -> None:
    here = list(stage(epochs=1).steps())
    loaded = stage(epochs=1, workers=2, prefetch=3)
    for _ in range(2):
        assert all(same(left, right) for left, right in zip(loaded.steps(), here, strict=True))
    assert all(same(left, right) for left, right in zip(loaded.steps(2), here[2:], strict=True))
    next(iter(loaded.steps()))  # left in the middle
    assert all(same(left, right) for left, right in zip(loaded.steps(1), here[1:], strict=True))


def test_resume_reads_nothing_before_its_start(rows: list[Any], listed: Any, stage: Stage) -> None:
    whole = list(stage(epochs=3).steps())
    data = stage(epochs=3)
    read: list[int] = []

    class Watched(listed):
        def __getitem__(self, index: int) -> Conversation:
            read.append(index)
            return super().__getitem__(index)

    data.mixture.sources = (Source(Watched(rows)),)
    assert all(same(left, right) for left, right in zip(data.steps(5), whole[5:], strict=True))
    assert len(read) == 8 + 8 + 6 + 30  # the last three steps of the second epoch, and the third


def test_how_many_steps(stage: Stage) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 4), ({"epochs": 2.5}, 10), ({"epochs": 0.1}, 1), ({"max_steps": 3}, 3), ({"max_steps": 11}, 11),
        ({"epochs": 1, "max_steps": 11}, 4), ({"epochs": 3, "max_steps": 5}, 5),
    ]  # fmt: skip
    for options, total in cases:
        data = stage(**options)
        assert (data.total_steps, data.steps_per_epoch) == (total, 4)
        assert len(list(data.steps())) == total


def test_stage_data_travels_to_spawned_workers(stage: Stage) -> None:
    data = stage(epochs=1)
    first = next(iter(data.steps()))
    assert same(next(iter(pickle.loads(pickle.dumps(data)).steps())), first)


@pytest.fixture
def broken(rows: list[Any], talk: Talk, tmp_path: Path) -> list[Any]:
    """Thirty samples of which four are defective, each in its own way."""
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG nothing")
    bad = [
        SampleError("row", "rows.json row 3", "expected an object"),
        talk("<image>", "a", id="count"),
        talk("<image>", "a", images=[tmp_path / "gone.png"], id="gone"),
        talk("<image>", "a", images=[tmp_path / "corrupt.png"], id="corrupt"),
    ]
    return [*rows[:26], *bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_one_clear_error(workers: int, stage: Stage, broken: list[Any]) -> None:
    with pytest.raises(DataError) as caught:
        list(stage(broken, workers=workers).steps())
    assert isinstance(caught.value, SampleError)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in ("row 3", "'count'", "'gone'", "'corrupt'"))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_leave_their_places_empty(world: int, workers: int, stage: Stage, broken: list[Any]) -> None:
    options: dict[str, Any] = {"on_bad": "skip", "max_bad_rate": 0.2, "world": world, "workers": workers}
    ranks = [list(stage(broken, rank=rank, **options).steps()) for rank in range(world)]
    told = sorted(reason for steps in ranks for step in steps for reason in step.skipped)
    assert len(told) == 4 and sum(step.bad for steps in ranks for step in steps) == 4
    for name in ("row 3", "'count'", "gone.png does not exist", "'corrupt'"):
        assert name in "".join(told)
    for steps in zip(*ranks, strict=True):
        assert len({len(step.batches) for step in steps}) == 1
    everything = sorted(name for steps in ranks for step in steps for name in ids(step))
    assert everything == sorted(row.id for row in broken[:26])
    counted = sum(step.samples for steps in ranks for step in steps)
    assert counted == 26


def test_too_many_bad_samples_end_the_run(stage: Stage, broken: list[Any]) -> None:
    with pytest.raises(DataError, match=r"samples were skipped as defective: max_bad_rate is 0\.1") as caught:
        list(stage(broken, on_bad="skip", max_bad_rate=0.1).steps())
    assert "foveate data check" in str(caught.value) and "sample '" in str(caught.value)
    assert len(list(stage(broken, on_bad="skip", max_bad_rate=0.14).steps())) == 4


def test_dropped_samples_are_told_but_are_no_defects(stage: Stage, rows: list[Any], talk: Talk) -> None:
    data = [*rows, talk("long", "word " * 300, id="endless")]
    steps = list(stage(data, {"on_long": "drop", "max_length": 200}, on_bad="error", max_bad_rate=0.0).steps())
    assert [reason for step in steps for reason in step.skipped if "'endless'" in reason]
    assert sum(step.bad for step in steps) == 0 and sum(step.samples for step in steps) == 30
    with pytest.raises(SampleError, match="'endless'"):
        list(stage(data, {"on_long": "cut", "max_length": 200}).steps())
