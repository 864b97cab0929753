"""Asking a model every question of a data set, and scoring its answers by type of question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from foveate.errors import DataError, UserError
from foveate_lab.generation import Answerer, Reply
from foveate_lab.queries import Query
from foveate_lab.scoring import MetricName, Score, form, score, summary

Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""What `Display.counting` is: a task's name and size to a function that hears how much is done."""

Metric = Literal["auto", "exact", "yesno", "letter"]
"""A metric for all questions; `auto`: for each the one that its reference has the form of."""


def evaluate(
    answerer: Answerer, queries: Sequence[Query], metric: Metric = "auto", batch_size: int = 16, longest: int = 128,
    counting: Counting | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Asks every question and scores its answer.

    Returns `overall` and `types` (type → what `scoring.summary` tells; a question without a type counts under its
    metric), `unfinished` (answers that did not end within `longest` tokens) and `answers`, one a question in the order
    of `queries`. Raises `DataError`, before anything is computed, where a question cannot be put or scored.
    """
    metrics = metrics_of(queries, metric)
    prompts = [answerer.prompt(query) for query in queries]
    replies = answer_all(answerer, queries, batch_size, longest, counting)
    by_type: dict[str, list[Score]] = {}
    answers, scores = [], list[Score]()
    for query, name, prompt, reply in zip(queries, metrics, prompts, replies, strict=True):
        found, kind = score(name, reply.text, query.reference, query.options), query.type or name
        scores.append(found)
        by_type.setdefault(kind, []).append(found)
        answers.append(
            {
                "id": query.id, "type": kind, "metric": name, "prompt": prompt, "answer": reply.text,
                "reference": query.reference, "read_as": None if name == "exact" else found.said,
                "correct": found.correct, "finished": reply.ended,
            }
        )  # fmt: skip
    return {
        "overall": summary(scores),
        "types": {kind: summary(found) for kind, found in sorted(by_type.items())},
        "unfinished": sum(not reply.ended for reply in replies),
        "answers": answers,
    }


def metrics_of(queries: Sequence[Query], metric: Metric = "auto") -> list[MetricName]:
    """The metric of each question. Raises `DataError` where a reference has not the form of the one asked for."""
    found: list[MetricName] = [form(query.reference) if metric == "auto" else metric for query in queries]
    for query, name in zip(queries, found, strict=True):
        try:
            score(name, "", query.reference, query.options)
        except DataError as error:
            raise DataError(f"sample '{query.id}': {error}") from None
    return found


def answer_all(
    answerer: Answerer, queries: Sequence[Query], batch_size: int, longest: int, counting: Counting | None = None
) -> list[Reply]:
    """The answers, in the order of `queries`.

    Long questions go first, so that memory that does not suffice shows at once. Batches depend on the questions alone:
    a run and its export have the same. Raises `UserError` where a batch does not fit into memory.
    """

    def size(number: int) -> tuple[int, int]:
        asked = queries[number].conversation
        return len(asked.images), sum(len(turn.text) for turn in asked.turns)

    order = sorted(range(len(queries)), key=size, reverse=True)
    replies: dict[int, Reply] = {}
    with (counting or _unseen)("answering", len(queries)) as done:
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            try:
                found = answerer.answer([queries[number] for number in numbers], longest)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{answerer.device} has too little memory for a batch: lower --batch-size.") from error
            replies.update(zip(numbers, found, strict=True))
            done(len(replies))
    return [replies[number] for number in range(len(queries))]


def _unseen(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda number: None)
