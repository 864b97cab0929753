"""Metrics: what a trained LMM answers on held-out samples, with their pictures and with somebody else's."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate import options as _options
from foveate.errors import DataError
from foveate.types import Batch


@dataclass(frozen=True)
class Answer:
    """How one held-out sample was answered.

    `exact`: the likeliest token is the reference's at every supervised position, its end included; so greedy decoding
    would write exactly the reference. `blind`: the same when the model is shown another sample's pictures.
    """

    id: str
    meta: Mapping[str, Any]
    exact: bool
    blind: bool


@dataclass(frozen=True)
class Evaluation:
    """A table for people, and the same as named numbers for programs."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | int | float | None, ...]]
    values: dict[str, float]
    notes: tuple[str, ...] = ()


class Metric(ABC):
    """What a plugin registers with `register_metrics`: sees every answer once, then sums them up.

    The class declares `Options`, which a recipe's `evaluate: metrics:` entry fills.
    """

    class Options(_options.Options):
        """No options."""

    blind: ClassVar[bool] = False
    """Whether it wants `Answer.blind`; the held-out data are run twice then. Without, `Answer.blind` is False."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def update(self, answers: Sequence[Answer]) -> None:
        """Takes answers in; each sample of the held-out data comes once."""

    @abstractmethod
    def summary(self) -> Evaluation:
        """What the answers so far amount to."""


def exact_answers(batch: Batch, tokens: Tensor) -> list[bool | None]:
    """For each sample of `batch` whether all its `tokens` `[S]` are the targets; None where nothing is supervised."""
    where_S, zeros = batch.sample_targets.cpu(), torch.zeros(len(batch.sample_ids), dtype=torch.long)
    wrong = zeros.index_add(0, where_S, (tokens.cpu() != batch.target_ids.cpu()).long())
    total = zeros.index_add(0, where_S, torch.ones_like(where_S))
    return [bad == 0 if count else None for bad, count in zip(wrong.tolist(), total.tolist(), strict=True)]


def swap_pictures(batch: Batch, donors: Tensor | None = None) -> Batch | None:
    """The same batch, every picture replaced by one of another sample.

    Pictures change places within the row, half the row apart; where one sample has more than half of them, the first
    of `donors` `[J, 3, H, W]` (of another row) stand in. None where these are too few.
    """
    images = len(batch.images)
    if images >= 2 * max((image.index + 1 for image in batch.images), default=0):
        return dataclasses.replace(batch, pixels=batch.pixels.roll(images // 2, 0)) if images else batch
    if donors is None or len(donors) < images:
        return None
    return dataclasses.replace(batch, pixels=donors[:images])


def _blind(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Each batch, and the same with swapped pictures; rows that must borrow some may have to wait to the end."""
    donors: Tensor | None = None
    waiting: list[Batch] = []
    for batch in batches:
        if swapped := swap_pictures(batch, donors):
            yield batch, swapped
        else:
            waiting.append(batch)
        if donors is None or len(batch.pixels) > len(donors):
            donors = batch.pixels
    for batch in waiting:
        swapped = swap_pictures(batch, None if donors is batch.pixels else donors)
        if swapped is None:
            raise DataError(f"sample {batch.sample_ids[0]}: no other sample has as many pictures for a blind baseline.")
        yield batch, swapped


@torch.no_grad()
def evaluate(
    metrics: Sequence[Metric],
    batches: Iterable[Batch],
    predict: Callable[[Batch], Tensor],
    gather: Callable[[list[Answer]], list[Answer]] = list,
) -> list[Evaluation]:
    """Answers held-out `batches` and hands each metric every answer; `gather` joins those of all processes.

    `predict`: a batch to the tokens `[S]` that the model finds likeliest at its supervised positions. Raises
    `DataError` when a blind baseline is asked for and no other sample has pictures to show.
    """
    blind = any(metric.blind for metric in metrics)
    answers: list[Answer] = []
    for batch, swapped in _blind(batches) if blind else ((batch, batch) for batch in batches):
        seen = exact_answers(batch, predict(batch))
        guessed = exact_answers(batch, predict(swapped)) if blind else [False] * len(seen)
        for name, meta, exact, guess in zip(batch.sample_ids, batch.metas, seen, guessed, strict=True):
            if exact is not None and not batch.dummy:
                answers.append(Answer(name, meta, exact, bool(guess)))
    everyones = gather(answers)
    for metric in metrics:
        metric.update(everyones)
    return [metric.summary() for metric in metrics]
