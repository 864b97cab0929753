"""What `foveate eval` asks: every answer of a data set is the reference of one question, asked with its history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from foveate import Conversation, ImageRef
from foveate.data.dataset import SampleError
from foveate.data.images import open_image
from foveate.data.mixture import Mixture, Source
from foveate.data.sample import defects
from foveate.errors import DataError
from foveate.types import IMAGE_PLACEHOLDER
from foveate_lab.scoring import options_in

_SHOWN = 8
"""Defects that an error lists."""


@dataclass(frozen=True)
class Query:
    """A question: the turns up to it with the images that they show, and the answer that the data give.

    `type` is the row of the table that it counts in, None where the data do not say.
    """

    conversation: Conversation
    reference: str
    type: str | None

    @property
    def id(self) -> str:
        """The row's id, and from the row's second question on its number: `scene-7#2`."""
        return self.conversation.id

    @cached_property
    def options(self) -> Mapping[str, str]:
        """Letter → text of its options: those of the row's `meta`, else those that the question lists."""
        given = self.conversation.meta.get("options")
        if not given:
            return options_in(self.conversation.turns[-1].text)
        pairs = given.items() if isinstance(given, Mapping) else zip("ABCDEF", given, strict=False)
        return {str(letter).upper(): str(text) for letter, text in pairs}


class Rows(Protocol):
    """A data set, or several joined."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Conversation: ...


class Joined:
    """The rows of a recipe's sources, one source after the other, as its evaluation reads them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._mixture = Mixture(sources, shuffle=False)

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, index: int) -> Conversation:
        source, row = self._mixture.sample_at(0, index)
        return self._mixture.sources[source].dataset[row]


def read_queries(rows: Rows, limit: int | None = None) -> list[Query]:
    """The first `limit` questions; no picture is opened. A question's history are the turns before it, with the answers
    of the data. Rows without turns ask nothing.

    Raises `DataError` with the rows that are defective, or where there is nothing to ask.
    """
    found, wrong = list[Query](), list[SampleError]()
    for index in range(len(rows)):
        if limit is not None and len(found) >= limit:
            break
        try:
            conversation = rows[index]
            for defect in defects(conversation):
                raise defect
            found += _questions(conversation)
        except SampleError as error:
            wrong.append(error)
    _refuse(wrong)
    if not found:
        raise DataError("the data ask nothing: no row has a question and its answer.")
    return found[:limit]


def _questions(conversation: Conversation) -> Iterator[Query]:
    turns, meta = conversation.turns, conversation.meta
    shown = [ref for ref in conversation.images if ref.role == "input"]
    answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
    for number, at in enumerate(answers):
        if at == 0 or turns[at - 1].role != "user":
            raise SampleError("row", f"sample '{conversation.id}'", f"answer {number + 1} follows no question")
        images = shown[: sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns[:at])]
        name = f"{conversation.id}#{number + 1}" if number else conversation.id
        asked = Conversation(name, turns[:at], tuple(images), meta)
        yield Query(asked, turns[at].text, _type(meta, number))


def _type(meta: Mapping[str, Any], number: int) -> str | None:
    """`type`; or `kind`, as the data set `digits` says, which has `kinds` where a conversation asks several."""
    kinds = meta.get("kinds")
    named = kinds[number] if isinstance(kinds, list | tuple) and number < len(kinds) else meta.get("kind")
    found = meta.get("type", named)
    return None if found is None else str(found)


def pictures_of(queries: Sequence[Query]) -> list[tuple[str, ImageRef]]:
    """Every picture that must be read, with the first question that shows it; those made by a function are left out."""
    found = dict[Any, tuple[str, ImageRef]]()
    for query in queries:
        for ref in query.conversation.images:
            if not callable(ref.source):
                found.setdefault(ref.source if isinstance(ref.source, Path) else id(ref.source), (query.id, ref))
    return list(found.values())


def check_pictures(
    pictures: Sequence[tuple[str, ImageRef]], done: Callable[[int], object] = lambda number: None
) -> None:
    """Opens each picture; `done` hears how many. Raises `DataError` with those that cannot be read."""
    wrong = list[SampleError]()
    for number, (name, ref) in enumerate(pictures, 1):
        try:
            open_image(ref, f"sample '{name}'")
        except SampleError as error:
            wrong.append(error)
        done(number)
    _refuse(wrong)


def _refuse(wrong: Sequence[SampleError]) -> None:
    if wrong:
        lines = [f"  {error}" for error in wrong[:_SHOWN]]
        lines += [f"  and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        many = "one sample is" if len(wrong) == 1 else f"{len(wrong)} samples are"
        raise DataError("\n".join([f"nothing was asked, because {many} defective:", *lines]))
