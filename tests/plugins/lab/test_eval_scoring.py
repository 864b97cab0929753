"""Scores of answers against what is known of them otherwise: scikit-learn, closed formulas, tables made by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from foveate.errors import DataError
from foveate_lab.scoring import (
    METRICS,
    Score,
    form,
    letter_of,
    normalised,
    options_in,
    score,
    summary,
    yes_or_no,
)

COLOURS = {"A": "Red", "B": "green", "C": "dark green."}


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("Red", " red.\n", True),
        ("  RED .", "red", True),
        ("red..", "red", False),
        ("dark  green", "dark green", False),
        ("a red one", "red", False),
        ("", ".", True),
        ("ß", "SS", True),
    ],
)
def test_exact_forgives_case_surrounding_whitespace_and_one_full_stop(answer: str, reference: str, same: bool) -> None:
    assert score("exact", answer, reference, {}).correct is same
    assert (normalised(answer) == normalised(reference)) is same


@pytest.mark.parametrize(
    ("reference", "metric"),
    [
        ("Yes", "yesno"), ("no.", "yesno"), (" NO ", "yesno"), ("Yes, it is.", "exact"), ("not", "exact"),
        ("A", "letter"), ("F.", "letter"), ("(C)", "letter"), ("(C).", "letter"), ("B)", "letter"),
        ("G", "exact"), ("a", "exact"), ("A dog", "exact"), ("B. green", "exact"), ("7", "exact"), ("", "exact"),
    ],
)  # fmt: skip
def test_the_form_of_a_reference_chooses_the_metric(reference: str, metric: str) -> None:
    assert form(reference) == metric and metric in METRICS


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", ("yes", True)),
        ("yes, there is no doubt", ("no", True)),  # a `no` anywhere in the sentence is no: that is POPE's rule
        ("No", ("no", True)),
        ("NO!", ("yes", False)),  # `no!` is not the word
        ("There is not. Yes.", ("no", True)),
        ("Yes. There is no dog.", ("yes", True)),
        ("no,it is", ("yes", False)),
        ("No, it is", ("no", True)),
        ("Nothing", ("yes", False)),
        ("", ("yes", False)),
    ],
)
def test_yes_and_no_are_read_as_pope_does(answer: str, read: tuple[str, bool]) -> None:
    assert yes_or_no(answer) == read


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), (" B. ", "B"), ("(B)", "B"), ("B: green", "B"), ("B) green", "B"), ("(B) green", "B"), ("b", "B"),
        ("b.", "B"), ("Green", "B"), ("dark green", "C"), ("A red one", None), ("B green", None), ("G", None),
        ("(G)", None), ("blue", None), ("", None), ("AB", None), ("It is (B)", None),
    ],
)  # fmt: skip
def test_an_option_is_named_by_its_letter_or_its_text(answer: str, letter: str | None) -> None:
    assert letter_of(answer, COLOURS) == letter
    assert score("letter", answer, "B", COLOURS).correct is (letter == "B")
    assert score("letter", answer, "green", COLOURS).correct is (letter == "B")


def test_a_text_that_two_options_share_names_none() -> None:
    assert letter_of("red", {"A": "red", "B": "Red."}) is None


def test_options_are_found_in_the_question() -> None:
    question = "<image>\nWhich? Is it A. or so?\nA. red\n (B)  dark green \nC) 3.5 m\nD: so: so\nG. no\nAn answer:"
    assert options_in(question) == {"A": "red", "B": "dark green", "C": "3.5 m", "D": "so: so"}
    assert options_in("Is it red?") == {}


@pytest.mark.parametrize(("metric", "reference"), [("yesno", "red"), ("letter", "red"), ("letter", "Yes")])
def test_a_reference_of_another_form_is_refused(metric: Any, reference: str) -> None:
    with pytest.raises(DataError, match=f"reference '{reference}'"):
        score(metric, "A", reference, {"A": "blue"})


def drawn(seed: int) -> tuple[list[str], list[str]]:
    """Random answers and references of yes-or-no questions."""
    rng = random.Random(seed)
    share = rng.random()
    n = rng.randrange(1, 60)
    answers = ["yes" if rng.random() < share else "no" for _ in range(n)]
    return answers, [rng.choice(("yes", "no")) for _ in range(n)]


@pytest.mark.parametrize("seed", range(40))
def test_yes_no_numbers_are_those_of_scikit_learn(seed: int) -> None:
    answers, meant = drawn(seed)
    told = summary([score("yesno", *pair, {}) for pair in zip(answers, meant, strict=True)])
    found = told["yesno"]
    for key, judge in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = judge(meant, answers, pos_label="yes", zero_division=math.nan)
        assert (found[key] is None) if math.isnan(expected) else found[key] == pytest.approx(expected, abs=1e-12), key
    assert found["yes_ratio"] == pytest.approx(answers.count("yes") / len(answers))
    share = sum(said == right for said, right in zip(answers, meant, strict=True)) / len(meant)
    assert found["accuracy"] == told["accuracy"] == share
    assert found["unclear"] == 0 and found["n"] == told["n"] == len(meant)


def test_answers_that_say_neither_are_counted_and_taken_for_yes() -> None:
    found = summary([score("yesno", "perhaps", meant, {}) for meant in ("yes", "no", "no")])["yesno"]
    assert (found["unclear"], found["yes_ratio"], found["accuracy"]) == (3, 1.0, 1 / 3)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 37), (5, 37), (36, 37), (500, 1000)])
def test_the_interval_is_wilsons(correct: int, n: int) -> None:
    """The closed form: the centre and half-width of the shares whose z-test does not reject the one that was seen."""
    told = summary([Score("exact", "a", "a" if number < correct else "b") for number in range(n)])
    z, share = 1.959963984540054, correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert told["interval"] == pytest.approx([centre - half, centre + half], abs=1e-9)
    assert (told["n"], told["correct"], told["accuracy"], told["metrics"]) == (n, correct, share, ["exact"])
    assert "yesno" not in told


def test_a_type_may_mix_metrics() -> None:
    told = summary([score("letter", "A", "A", {}), score("yesno", "no", "yes", {}), score("exact", "7", "7", {})])
    assert told["metrics"] == ["exact", "yesno", "letter"] and told["correct"] == 2
    assert told["yesno"]["n"] == 1 and told["yesno"]["accuracy"] == 0
