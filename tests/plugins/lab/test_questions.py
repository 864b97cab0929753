"""Captions and questions, each answer computed again from the ground truth by parsing the text."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from foveate_lab.questions import HELD_OUT_KINDS, KINDS, Kind, ask, caption, chance, majority
from foveate_lab.scenes import COMPASS, Scene, SceneOptions, make_scene, stream

SCENES = [make_scene(SceneOptions(), "train", index) for index in range(600)]

Truth = dict[str, tuple[int, str]]
"""Place → digit and colour, in reading order."""


def truth_of(scene: Scene) -> Truth:
    return {cell.place: (cell.digit, cell.colour) for cell in scene.cells}


def scan_again(name: str, sought: str, truth: Truth) -> tuple[str, str]:
    """The whole answer that looks at every cell, and its last word, by another road than the module's."""
    column = 0 if name == "Digit" else 1
    cells = [str(truth[place][column]) if place in truth else "none" for place in COMPASS]
    counts = [cells[: number + 1].count(sought) for number in range(9)]
    tally = [("yes" if count else "no") if name == "Digit" else str(count) for count in counts]
    rows = [" ".join(row) for row in zip(COMPASS, cells, [sought] * 9, tally, strict=True)]
    return f"{name} {' '.join(rows)}", tally[-1]


def answer_again(text: str, truth: Truth) -> tuple[str, str]:
    """The whole answer to a question, and the part of it that was asked for."""
    if found := re.fullmatch(r"Is there any (\d)\?", text):
        return scan_again("Digit", found[1], truth)
    if found := re.fullmatch(r"Which digit is (\w+)\?", text):
        value = str(truth[found[1]][0])
        return f"Digit {found[1]} {value}", value
    if found := re.fullmatch(r"What colour is (\w+)\?", text):
        return f"Colour {found[1]} {truth[found[1]][1]}", truth[found[1]][1]
    if found := re.fullmatch(r"How many are (\w+)\?", text):
        return scan_again("Colour", found[1], truth)
    if found := re.fullmatch(r"Is (\w+) larger than (\w+)\?", text):
        one, two = (truth[place][0] for place in found.groups())
        value = "yes" if one > two else "no"
        return f"Digit {found[1]} {one} {found[2]} {two} {value}", value
    found = re.fullmatch(r"Where is the (\d)\?", text)
    assert found, text
    places = " ".join(place for place, (digit, _) in truth.items() if digit == int(found[1]))
    return f"Place {found[1]} {places}", places


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: Kind) -> None:
    for number, scene in enumerate(SCENES):
        question = ask(scene, kind, np.random.default_rng(number))
        assert question.kind == kind
        assert (question.answer, question.value) == answer_again(question.text, truth_of(scene))


def test_answers_are_entries_of_the_captions_clauses() -> None:
    """What is said of a cell stands in a caption of the same scene, word for word."""
    for number, scene in enumerate(SCENES[:100]):
        rng = np.random.default_rng(number)
        told = entries(caption(scene, rng))
        for kind, width in (("identity", 2), ("colour", 2), ("comparison", 2), ("presence", 4), ("count", 4)):
            clause, *words = ask(scene, kind, rng).answer.split()
            said = list(zip(words[::width], words[1::width], strict=False))[: len(words) // width]
            assert said and all(told[clause][place] == what for place, what in said)


@pytest.mark.parametrize("kind", ["presence", "comparison"])
def test_yes_and_no_are_balanced(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    answers = Counter(ask(scene, kind, rng).value for scene in SCENES for _ in range(5))
    assert answers["yes"] / answers.total() == pytest.approx(0.5, abs=0.03)


def test_presence_does_not_give_itself_away_by_the_digit() -> None:
    rng = np.random.default_rng(1)
    asked = [ask(scene, "presence", rng) for scene in SCENES for _ in range(10)]
    by_digit = {str(digit): [q.value == "yes" for q in asked if str(digit) in q.text] for digit in range(10)}
    assert all(np.mean(yes) == pytest.approx(0.5, abs=0.08) for yes in by_digit.values())


def entries(text: str) -> dict[str, dict[str, str]]:
    """Clause → place → what is there."""
    assert text.endswith(".")
    clauses = {part.split()[0]: part.split()[1:] for part in text[:-1].split(". ")}
    return {name: dict(zip(words[::2], words[1::2], strict=True)) for name, words in clauses.items()}


def test_a_caption_tells_the_whole_scene() -> None:
    firsts = set()
    for number, scene in enumerate(SCENES):
        text, truth = caption(scene, np.random.default_rng(number)), truth_of(scene)
        assert entries(text) == {
            name: {place: str(truth[place][column]) if place in truth else "none" for place in COMPASS}
            for column, name in enumerate(("Digit", "Colour"))
        }
        firsts.add((text.split()[0], text.split()[1]))
    assert len(firsts) == 9 + 9  # any clause first, any entry first in it


def test_a_caption_has_the_clauses_that_are_asked_for() -> None:
    assert set(entries(caption(SCENES[0], np.random.default_rng(0), ("colour",)))) == {"Colour"}


def test_text_depends_on_its_stream_only() -> None:
    scene = SCENES[0]

    def texts() -> list[str]:
        rng = stream("questions", "train", 0, 0)
        return [caption(scene, rng), *(ask(scene, kind, rng).text for kind in KINDS)]

    assert texts() == texts()


def test_where_prefers_digits_that_stand_in_one_place() -> None:
    rng = np.random.default_rng(2)
    for scene in SCENES[:200]:
        counts = Counter(cell.digit for cell in scene.cells)
        answer = ask(scene, "where", rng).value
        assert (len(answer.split()) > 1) == (1 not in counts.values())


def test_scenes_of_one_digit_can_be_asked_everything() -> None:
    sparse = (make_scene(SceneOptions(density=0.0), "train", index) for index in range(400))
    scene = next(scene for scene in sparse if len({cell.digit for cell in scene.cells}) == 1)
    questions = {kind: ask(scene, kind, np.random.default_rng(0)) for kind in KINDS}
    assert questions["comparison"].value == "no"
    assert questions["where"].value == " ".join(cell.place for cell in scene.cells)


def test_presence_with_all_ten_digits_there_says_yes() -> None:
    options = SceneOptions(rows=9, columns=9, density=1.0)
    scene = make_scene(options, "train", 0)
    assert {ask(scene, "presence", np.random.default_rng(seed)).value for seed in range(20)} == {"yes"}


def test_chance_and_majority() -> None:
    options = SceneOptions(colours=("red", "blue", "white"))
    expected = {"presence": 1 / 2, "identity": 1 / 10, "colour": 1 / 3, "count": 1 / 10, "comparison": 1 / 2}
    assert {kind: chance(kind, options) for kind in HELD_OUT_KINDS} == expected
    assert chance("where", options) == pytest.approx(1 / 9)
    assert majority(["1", "0", "1", "2"]) == ("1", 0.5)
    assert majority(["b", "a"]) == ("a", 0.5)
    with pytest.raises(ValueError, match="no answers"):
        majority([])
