"""How answers are scored: exact match, yes or no, option letters; and the table of shares with their intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from scipy.stats import binomtest

from foveate.errors import DataError

MetricName = Literal["exact", "yesno", "letter"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)

_LETTER = re.compile(r"\(([A-F])\)|([A-F])(?=[.:),]|$)")
_OPTION = re.compile(r"^\s*(?:\(([A-F])\)|([A-F])[.:)])\s*(\S.*?)\s*$", re.M)


@dataclass(frozen=True)
class Score:
    """One answer: what it and the reference were read as (`said` is None where it cannot be), and whether they agree.

    `clear` is False for a yes-or-no answer that has neither word.
    """

    metric: MetricName
    said: str | None
    meant: str
    clear: bool = True

    @property
    def correct(self) -> bool:
        """Whether answer and reference were read as the same."""
        return self.said == self.meant


def normalised(text: str) -> str:
    """Without surrounding whitespace, one final full stop, and upper case."""
    return text.strip().removesuffix(".").rstrip().casefold()


def form(reference: str) -> MetricName:
    """The metric that a reference asks for: `yesno` for yes or no alone, `letter` for A to F alone, else `exact`."""
    if normalised(reference) in ("yes", "no"):
        return "yesno"
    found = _LETTER.match(reference.strip())
    return "letter" if found and len(reference.strip()) <= found.end() + 1 else "exact"


def options_in(question: str) -> dict[str, str]:
    """Letter → text of the options that a question lists, one a line: `A. red`, `A) red`, `A: red` or `(A) red`."""
    return {one or other: text for one, other, text in _OPTION.findall(question)}


def yes_or_no(answer: str) -> tuple[str, bool]:
    """What the evaluation of POPE (arXiv 2305.10355) reads in an answer, and whether one of the words is there.

    The first sentence counts, without commas: no where it has the word `no` or `not`, in any case; else yes, whatever
    it says.
    """
    words = answer.partition(".")[0].replace(",", "").casefold().split()
    negative = "no" in words or "not" in words
    return ("no" if negative else "yes"), negative or "yes" in words


def letter_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names: by its letter, alone or before `.`, `:`, `)` or `,`, or by exactly its text."""
    found = _LETTER.match(answer.strip())
    if found:
        return found[1] or found[2]
    if re.fullmatch(r"[a-f]", normalised(answer)):
        return normalised(answer).upper()
    named = [letter for letter, text in options.items() if normalised(text) == normalised(answer)]
    return named[0] if len(named) == 1 else None


def score(metric: MetricName, answer: str, reference: str, options: Mapping[str, str]) -> Score:
    """An answer beside its reference; `options`: letter → text, for the metric `letter`.

    Raises `DataError` where the reference is none of the metric's form.
    """
    if metric == "exact":
        return Score(metric, normalised(answer), normalised(reference))
    if metric == "letter":
        meant = letter_of(reference, options)
        if meant is None:
            raise DataError(f"the reference {reference!r} is no option letter: --metric exact compares it as text")
        return Score(metric, letter_of(answer, options), meant)
    meant, clear = yes_or_no(reference)
    if not clear:
        raise DataError(f"the reference {reference!r} says neither yes nor no: --metric exact compares it as text")
    said, clear = yes_or_no(answer)
    return Score(metric, said, meant, clear)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Numbers of some answers: `n`, `correct`, `accuracy`, its 95 % interval by Wilson's method, and `metrics`.

    Where there are yes-or-no questions, `yesno` has what is usual of them, "yes" being positive; a share of nothing is
    None.
    """
    n, correct = len(scores), sum(score.correct for score in scores)
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    told = {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": [float(interval.low), float(interval.high)],
        "metrics": sorted({score.metric for score in scores}, key=METRICS.index),
    }
    asked = [score for score in scores if score.metric == "yesno"]
    return {**told, "yesno": _yes_no(asked)} if asked else told


def _yes_no(scores: Sequence[Score]) -> dict[str, float | int | None]:
    n = len(scores)
    said, meant = (sum(getattr(score, side) == "yes" for score in scores) for side in ("said", "meant"))
    both = sum(score.said == score.meant == "yes" for score in scores)
    return {
        "n": n,
        "accuracy": sum(score.correct for score in scores) / n,
        "precision": both / said if said else None,
        "recall": both / meant if meant else None,
        "f1": 2 * both / (said + meant) if said + meant else None,
        "yes_ratio": said / n,
        "unclear": sum(not score.clear for score in scores),
    }
