"""Metrics: what a trained LMM answers on held-out samples, with their pictures and with somebody else's."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate import options as _options
from foveate.errors import DataError
from foveate.types import Batch

Predict = Callable[[Batch], Tensor]
"""A batch to the tokens `[S]` that the model finds likeliest at its supervised positions (`Learner.predict`)."""


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
        """Takes answers in; each sample of the held-out data comes once, in their order."""

    @abstractmethod
    def summary(self) -> Evaluation:
        """What the answers so far amount to."""


def exact_answers(batch: Batch, tokens: Tensor) -> list[bool | None]:
    """For each sample of `batch` whether all its `tokens` `[S]` are the targets; None where nothing is supervised."""
    wrong_S = (tokens.cpu() != batch.target_ids.cpu()).long()
    where_S, zeros = batch.sample_targets.cpu(), torch.zeros(len(batch.sample_ids), dtype=torch.long)
    wrong, total = zeros.index_add(0, where_S, wrong_S), zeros.index_add(0, where_S, torch.ones_like(wrong_S))
    return [bool(bad == 0) if count else None for bad, count in zip(wrong.tolist(), total.tolist(), strict=True)]


def swap_pictures(batch: Batch, donors: Tensor | None = None) -> Batch | None:
    """The same batch, every picture replaced by one of another sample.

    Pictures change places within the row, half the row apart; where one sample has more than half of them, the first
    of `donors` `[J, 3, H, W]` (of another row) stand in. None where these are too few.
    """
    images = len(batch.images)
    most = max((image.index + 1 for image in batch.images), default=0)
    if images >= 2 * most:
        return dataclasses.replace(batch, pixels=batch.pixels.roll(images // 2, 0)) if images else batch
    if donors is None or len(donors) < images:
        return None
    return dataclasses.replace(batch, pixels=donors[:images])


@torch.no_grad()
def evaluate(
    metrics: Sequence[Metric],
    batches: Iterable[Batch],
    predict: Predict,
    gather: Callable[[list[Answer]], list[Answer]] = list,
) -> list[Evaluation]:
    """Runs `predict` over held-out `batches` and hands each metric every answer; `gather` joins those of all processes.

    Raises `DataError` when a blind baseline is asked for and no other sample has pictures to show.
    """
    blind = any(metric.blind for metric in metrics)
    answers: list[Answer] = []
    lonely: list[Batch] = []
    donors: Tensor | None = None

    def answer(batch: Batch, swapped: Batch) -> None:
        seen = exact_answers(batch, predict(batch))
        unseen = exact_answers(batch, predict(swapped)) if blind else [False] * len(seen)
        for number, (exact, guess) in enumerate(zip(seen, unseen, strict=True)):
            if exact is not None and not batch.dummy:
                answers.append(Answer(batch.sample_ids[number], batch.metas[number], exact, bool(guess)))

    for batch in batches:
        swapped = swap_pictures(batch, donors) if blind else batch
        if blind and (donors is None or len(batch.pixels) > len(donors)):
            donors = batch.pixels
        if swapped is None:
            lonely.append(batch)
        else:
            answer(batch, swapped)
    for batch in lonely:
        swapped = swap_pictures(batch, None if donors is batch.pixels else donors)
        if swapped is None:
            raise DataError(f"sample {batch.sample_ids[0]}: no other sample has as many pictures for a blind baseline.")
        answer(batch, swapped)
    for metric in metrics:
        metric.update(gather(answers))
    return [metric.summary() for metric in metrics]
