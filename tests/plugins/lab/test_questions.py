"""Captions and questions, each answer computed again from the ground truth by parsing the text."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from foveate_lab.questions import HELD_OUT_KINDS, KINDS, Kind, ask, caption, chance, majority
from foveate_lab.scenes import SceneOptions, make_scene, stream

SCENES = [make_scene(SceneOptions(), "train", index) for index in range(600)]


def answer_again(text: str, truth: dict[str, tuple[int, str]]) -> str:
    """The answer from a table place → (digit, colour), by another road than the module's."""
    if found := re.fullmatch(r"Is there any (\d)\?", text):
        return "yes" if int(found[1]) in [digit for digit, _ in truth.values()] else "no"
    if found := re.fullmatch(r"Which digit is (\w+)\?", text):
        return str(truth[found[1]][0])
    if found := re.fullmatch(r"What colour is (\w+)\?", text):
        return truth[found[1]][1]
    if found := re.fullmatch(r"How many are (\w+)\?", text):
        return str([colour for _, colour in truth.values()].count(found[1]))
    if found := re.fullmatch(r"Is (\w+) larger than (\w+)\?", text):
        return "yes" if truth[found[1]][0] > truth[found[2]][0] else "no"
    found = re.fullmatch(r"Where is the (\d)\?", text)
    assert found, text
    return " and ".join(place for place, (digit, _) in truth.items() if digit == int(found[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: Kind) -> None:
    for number, scene in enumerate(SCENES):
        question = ask(scene, kind, np.random.default_rng(number))
        truth = {cell.place: (cell.digit, cell.colour) for cell in scene.cells}
        assert question.kind == kind
        assert question.value == answer_again(question.text, truth)
        assert question.answer == f"{question.restated} {question.value}"


def test_answers_restate_what_was_asked_in_the_captions_words() -> None:
    scene = SCENES[0]
    cell, other = scene.cells[0], next(cell for cell in scene.cells if cell.digit != scene.cells[0].digit)
    found: dict[str, str] = {}
    rng = np.random.default_rng(0)
    for _ in range(2000):
        question = ask(scene, KINDS[int(rng.integers(len(KINDS)))], rng)
        found[question.text] = question.answer
    assert found[f"Which digit is {cell.place}?"] == f"Digit {cell.place} {cell.digit}"
    assert found[f"What colour is {cell.place}?"] == f"Colour {cell.place} {cell.colour}"
    assert found[f"Is there any {cell.digit}?"] == f"Present {cell.digit} yes"
    order = "yes" if cell.digit > other.digit else "no"
    expected = f"Larger {cell.place} {cell.digit} {other.place} {other.digit} {order}"
    assert found[f"Is {cell.place} larger than {other.place}?"] == expected
    assert found["How many are white?"].startswith("Count white ")
    assert all(answer.startswith("Place ") for text, answer in found.items() if text.startswith("Where"))


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


def parsed(text: str) -> dict[str, dict[str, str]]:
    clauses = {part.split()[0]: part.split()[1:] for part in text.rstrip(".").split(". ")}
    return {name: dict(zip(words[::2], words[1::2], strict=True)) for name, words in clauses.items()}


def test_a_caption_tells_the_whole_scene() -> None:
    firsts = set()
    for number, scene in enumerate(SCENES):
        text = caption(scene, np.random.default_rng(number))
        clauses = parsed(text)
        assert clauses["Digit"] == {cell.place: str(cell.digit) for cell in scene.cells}
        assert clauses["Colour"] == {cell.place: cell.colour for cell in scene.cells}
        assert {int(digit) for digit, there in clauses["Present"].items() if there == "yes"} == {
            cell.digit for cell in scene.cells
        }
        assert sorted(clauses["Present"]) == list("0123456789")
        assert sum(int(count) for count in clauses["Count"].values()) == len(scene.cells)
        assert all(
            int(count) == sum(cell.colour == colour for cell in scene.cells)
            for colour, count in clauses["Count"].items()
        )
        firsts.add((text.split()[0], text.split()[1]))
    assert len(firsts) == 9 + 9 + 10 + 6  # any clause first, any entry first in it


def test_a_caption_has_the_clauses_that_are_asked_for() -> None:
    assert set(parsed(caption(SCENES[0], np.random.default_rng(0), ("colour", "count")))) == {"Colour", "Count"}


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
        assert (" and " in answer) == (1 not in counts.values())


def test_scenes_of_one_digit_can_be_asked_everything() -> None:
    sparse = (make_scene(SceneOptions(density=0.0), "train", index) for index in range(400))
    scene = next(scene for scene in sparse if len({cell.digit for cell in scene.cells}) == 1)
    questions = {kind: ask(scene, kind, np.random.default_rng(0)) for kind in KINDS}
    assert questions["comparison"].value == "no"
    assert questions["where"].value == " and ".join(cell.place for cell in scene.cells)


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
