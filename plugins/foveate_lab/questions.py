"""What is said and asked about a scene: dense captions, and questions of several kinds with one right answer each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from foveate_lab.scenes import Cell, Scene, SceneOptions

T = TypeVar("T")

Kind = Literal["presence", "identity", "colour", "count", "comparison", "where"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HELD_OUT_KINDS: tuple[Kind, ...] = ("presence", "identity", "colour", "count", "comparison")
"""The kinds that are evaluated. ``where`` is for training: it teaches to look a digit up."""


Clause = Literal["digit", "colour"]
CLAUSES: tuple[Clause, ...] = get_args(Clause)
"""The parts of a caption: what digit every cell holds, and in what colour."""

EMPTY = "none"
"""Stands for the digit and the colour of an empty cell."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene. The right ``answer`` first says what it rests on and ends in ``value``."""

    kind: Kind
    text: str
    restated: str
    value: str

    @property
    def answer(self) -> str:
        """The answer in a caption's words: ``Digit north 7``, or ``Colour northwest red red 1 … 2``."""
        return f"{self.restated} {self.value}"


def caption(scene: Scene, rng: np.random.Generator, clauses: Sequence[Clause] = CLAUSES) -> str:
    """``Digit north 7 east none …. Colour east none north red ….``, clauses and entries in random order.

    Every entry names what to look at and then what is there, so that it can be told from the word before it and the
    picture alone. This is what makes a small model learn to look; answers to questions are worded alike.
    """
    parts = []
    for number in rng.permutation(len(clauses)).tolist():
        entries = _entries(scene, clauses[number])
        words = [entries[entry] for entry in rng.permutation(len(entries)).tolist()]
        parts.append(f"{clauses[number].capitalize()} {' '.join(words)}.")
    return " ".join(parts)


def ask(scene: Scene, kind: Kind, rng: np.random.Generator) -> Question:
    """A question of a kind about a scene, drawn from ``rng``.

    Presence is balanced: yes and no are equally likely. So is comparison, but for scenes of one digit only.
    """
    if kind == "presence":
        return _presence(scene, rng)
    if kind == "count":
        colour = _pick(scene.options.colours, rng)
        return Question("count", f"How many are {colour}?", *_scan(scene, "colour", colour))
    if kind == "comparison":
        one, two = _unequal_pair(scene.cells, rng)
        text = f"Is {one.place} larger than {two.place}?"
        restated = f"Digit {one.place} {one.digit} {two.place} {two.digit}"
        return Question("comparison", text, restated, "yes" if one.digit > two.digit else "no")
    if kind == "where":
        counts = Counter(cell.digit for cell in scene.cells)
        once = [digit for digit, count in counts.items() if count == 1]
        digit = _pick(once or list(counts), rng)
        places = " ".join(cell.place for cell in scene.cells if cell.digit == digit)
        return Question("where", f"Where is the {digit}?", f"Place {digit}", places)
    cell = _pick(scene.cells, rng)
    if kind == "identity":
        return Question("identity", f"Which digit is {cell.place}?", f"Digit {cell.place}", str(cell.digit))
    return Question("colour", f"What colour is {cell.place}?", f"Colour {cell.place}", cell.colour)


def chance(kind: Kind, options: SceneOptions) -> float:
    """Accuracy of a uniform guess among the answers that a kind of question can have; one place for ``where``."""
    cells = options.rows * options.columns
    answers = {"identity": 10, "colour": len(options.colours), "count": cells + 1, "where": cells}
    return 1 / answers.get(kind, 2)


def majority(answers: Iterable[str]) -> tuple[str, float]:
    """The most frequent answer and its share: what a model reaches that always says the same.

    Raises ValueError when there is no answer.
    """
    counts = Counter(answers)
    if not counts:
        raise ValueError("no answers to take a majority of")
    answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return answer, count / counts.total()


def _entries(scene: Scene, clause: Clause) -> list[str]:
    """What a clause tells of every cell in reading order: ``north 7``, ``east none``."""
    found = {cell.place: str(cell.digit) if clause == "digit" else cell.colour for cell in scene.cells}
    return [f"{place} {found.get(place, EMPTY)}" for place in scene.places]


def _scan(scene: Scene, clause: Clause, sought: str) -> tuple[str, str]:
    """An answer that needs to look everywhere: cell by cell what is there, what is sought, and the finding so far.

    ``Digit northwest 3 7 no north 7 7 yes east none 7 …`` yes for any 7, ``Colour northwest red red 1 north none red 1
    …`` 2 for the red ones. Each word can be told from the few before it and the picture; the last one is the value.
    """
    words, found = [clause.capitalize()], 0
    for entry in _entries(scene, clause):
        found += entry.endswith(f" {sought}")
        words += [entry, sought, str(found) if clause == "colour" else "yes" if found else "no"]
    return " ".join(words[:-1]), words[-1]


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    present = sorted({cell.digit for cell in scene.cells})
    absent = [digit for digit in range(10) if digit not in present]
    yes = bool(rng.random() < 0.5) or not absent
    digit = _pick(present if yes else absent, rng)
    return Question("presence", f"Is there any {digit}?", *_scan(scene, "digit", str(digit)))


def _unequal_pair(cells: tuple[Cell, ...], rng: np.random.Generator) -> tuple[Cell, Cell]:
    """Two cells, with different digits if there are such; each of the two orders is equally likely."""
    order = rng.permutation(len(cells)).tolist()
    first = cells[order[0]]
    others = [cells[number] for number in order[1:]]
    second = next((cell for cell in others if cell.digit != first.digit), others[0])
    return (first, second) if rng.random() < 0.5 else (second, first)


def _pick(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]
