"""Captions and questions, each answer computed again from the ground truth by parsing the text."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from foveate_lab.questions import HELD_OUT_KINDS, KINDS, Kind, ask, caption, chance, majority
from foveate_lab.scenes import COMPASS, Scene, SceneOptions, make_scene, stream

SCENES = [make_scene(SceneOptions(), "train", index) for index in range(600)]
PLACES = set(COMPASS)


Truth = dict[str, tuple[int, str]]
"""Place → digit and colour, in reading order."""


def truth_of(scene: Scene) -> Truth:
    return {cell.place: (cell.digit, cell.colour) for cell in scene.cells}


def places_of(sought: str, truth: Truth) -> str:
    """Where a digit or a colour is, in reading order, by another road than the module's."""
    return " ".join(place for place, found in truth.items() if sought in map(str, found)) or "nowhere"


def answer_again(text: str, truth: Truth) -> tuple[str, str]:
    """The whole answer to a question, and the part of it that was asked for."""
    if found := re.fullmatch(r"Is there any (\d)\?", text):
        value = "yes" if int(found[1]) in [digit for digit, _ in truth.values()] else "no"
        return f"Digits {found[1]} {places_of(found[1], truth)} {value}", value
    if found := re.fullmatch(r"Which digit is (\w+)\?", text):
        value = str(truth[found[1]][0])
        return f"Digit {found[1]} {value}", value
    if found := re.fullmatch(r"What colour is (\w+)\?", text):
        return f"Colour {found[1]} {truth[found[1]][1]}", truth[found[1]][1]
    if found := re.fullmatch(r"How many are (\w+)\?", text):
        number = [colour for _, colour in truth.values()].count(found[1])
        return f"Colours {found[1]} {places_of(found[1], truth)} {number}", str(number)
    if found := re.fullmatch(r"Is (\w+) larger than (\w+)\?", text):
        one, two = (truth[place][0] for place in found.groups())
        value = "yes" if one > two else "no"
        return f"Digit {found[1]} {one} {found[2]} {two} {value}", value
    found = re.fullmatch(r"Where is the (\d)\?", text)
    assert found, text
    return f"Digits {found[1]} {places_of(found[1], truth)}", places_of(found[1], truth)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: Kind) -> None:
    for number, scene in enumerate(SCENES):
        question = ask(scene, kind, np.random.default_rng(number))
        assert question.kind == kind
        assert (question.answer, question.value) == answer_again(question.text, truth_of(scene))


def test_answers_are_entries_of_the_captions_clauses() -> None:
    """What is said before the value stands in a caption of the same scene, word for word."""
    for number, scene in enumerate(SCENES[:100]):
        rng = np.random.default_rng(number)
        told = entries(caption(scene, rng))
        for kind in ("presence", "identity", "colour", "count", "where"):
            question = ask(scene, kind, rng)
            said = question.restated if kind in ("presence", "count") else question.answer
            clause, sought, *found = said.split()
            assert told[clause][sought] == found
        words = ask(scene, "comparison", rng).restated.split()
        assert [told[words[0]][place] for place in words[1::2]] == [[digit] for digit in words[2::2]]


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


def entries(text: str) -> dict[str, dict[str, list[str]]]:
    """Clause → what is looked for → what is found; digits and colours are followed by any number of places."""
    assert text.endswith(".")
    clauses: dict[str, dict[str, list[str]]] = {}
    for part in text[:-1].split(". "):
        name, *words = part.split()
        looked_for = PLACES if name in ("Digit", "Colour") else {*"0123456789", *SceneOptions().colours}
        clauses[name] = {}
        for word in words:
            if word in looked_for:
                assert word not in clauses[name]
                sought = clauses[name][word] = []
            else:
                sought.append(word)
    return clauses


def test_a_caption_tells_the_whole_scene() -> None:
    firsts = set()
    for number, scene in enumerate(SCENES):
        text, truth = caption(scene, np.random.default_rng(number)), truth_of(scene)
        assert entries(text) == {
            "Digit": {place: [str(digit)] for place, (digit, _) in truth.items()},
            "Colour": {place: [colour] for place, (_, colour) in truth.items()},
            "Digits": {str(digit): places_of(str(digit), truth).split() for digit in range(10)},
            "Colours": {colour: places_of(colour, truth).split() for colour in SceneOptions().colours},
        }
        firsts.add((text.split()[0], text.split()[1]))
    assert len(firsts) == 9 + 9 + 10 + 6  # any clause first, any entry first in it


def test_a_caption_has_the_clauses_that_are_asked_for() -> None:
    assert set(entries(caption(SCENES[0], np.random.default_rng(0), ("colour", "digits")))) == {"Colour", "Digits"}


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
