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


Clause = Literal["digit", "colour", "digits", "colours"]
CLAUSES: tuple[Clause, ...] = get_args(Clause)
"""The parts of a caption: every filled cell's digit, its colour; where each of the ten digits is, where each colour."""

NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene. The right ``answer`` first says what it rests on and ends in ``value``."""

    kind: Kind
    text: str
    restated: str
    value: str

    @property
    def answer(self) -> str:
        """The answer in a caption's words: ``Digit north 7``; ``Digits 7 north yes``; ``Colours red north east 2``."""
        return f"{self.restated} {self.value}"


def caption(scene: Scene, rng: np.random.Generator, clauses: Sequence[Clause] = CLAUSES) -> str:
    """``Digit north 7 east 3. Colour …. Digits 3 east 0 nowhere …. Colours red north east …``, all in random order.

    Every entry names what to look for and then what is found, places in reading order. What is found can be told from
    the words before it and the picture, which is what makes a small model learn to look; answers to questions are
    worded alike.
    """
    parts = []
    for number in rng.permutation(len(clauses)).tolist():
        entries = _entries(scene, clauses[number])
        words = [f"{entries[entry][0]} {entries[entry][1]}" for entry in rng.permutation(len(entries)).tolist()]
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
        count = sum(cell.colour == colour for cell in scene.cells)
        return Question("count", f"How many are {colour}?", f"Colours {colour} {_places(scene, colour)}", str(count))
    if kind == "comparison":
        one, two = _unequal_pair(scene.cells, rng)
        text = f"Is {one.place} larger than {two.place}?"
        restated = f"Digit {one.place} {one.digit} {two.place} {two.digit}"
        return Question("comparison", text, restated, "yes" if one.digit > two.digit else "no")
    if kind == "where":
        counts = Counter(cell.digit for cell in scene.cells)
        once = [digit for digit, count in counts.items() if count == 1]
        digit = _pick(once or list(counts), rng)
        return Question("where", f"Where is the {digit}?", f"Digits {digit}", _places(scene, digit))
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


def _entries(scene: Scene, clause: Clause) -> list[tuple[str, str]]:
    """What a clause tells: pairs of what is looked for and what is found."""
    if clause == "digit":
        return [(cell.place, str(cell.digit)) for cell in scene.cells]
    if clause == "colour":
        return [(cell.place, cell.colour) for cell in scene.cells]
    if clause == "digits":
        return [(str(digit), _places(scene, digit)) for digit in sorted({cell.digit for cell in scene.cells})]
    return [(colour, _places(scene, colour)) for colour in sorted({cell.colour for cell in scene.cells})]


def _places(scene: Scene, sought: int | str) -> str:
    """The places of a digit or a colour in reading order, or ``nowhere``."""
    return " ".join(cell.place for cell in scene.cells if sought in (cell.digit, cell.colour)) or NOWHERE


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    present = sorted({cell.digit for cell in scene.cells})
    absent = [digit for digit in range(10) if digit not in present]
    yes = bool(rng.random() < 0.5) or not absent
    digit = _pick(present if yes else absent, rng)
    restated = f"Digits {digit} {_places(scene, digit)}"
    return Question("presence", f"Is there any {digit}?", restated, "yes" if yes else "no")


def _unequal_pair(cells: tuple[Cell, ...], rng: np.random.Generator) -> tuple[Cell, Cell]:
    """Two cells, with different digits if there are such; each of the two orders is equally likely."""
    order = rng.permutation(len(cells)).tolist()
    first = cells[order[0]]
    others = [cells[number] for number in order[1:]]
    second = next((cell for cell in others if cell.digit != first.digit), others[0])
    return (first, second) if rng.random() < 0.5 else (second, first)


def _pick(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]
