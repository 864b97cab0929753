"""The numbers of a comparison: of each run, means and spread over seeds, differences; as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate import __version__
from foveate.errors import RunError
from foveate.files import read_json

EVALUATION = "evaluation.json"
NUMBERS, PLOT = "comparison.json", "comparison.png"
FILES = (NUMBERS, PLOT)
BASELINES = {"chance": "chance", "majority": "most frequent answer"}
"""What an evaluation may report of a kind of question beside its accuracy; both depend on the data alone."""
_WIDE = 6
"""Kinds of questions whose deviations a table has room for."""

Spread = tuple[float, float | None]
"""A mean, and how uncertain it is; None where there is one value."""


@dataclass(frozen=True)
class Result:
    """What a run answers: accuracy by kind of question, and the data's baselines by their name and kind."""

    accuracy: dict[str, float]
    baselines: dict[str, dict[str, float]]

    @property
    def mean(self) -> float:
        """Over the kinds of questions, each counted alike."""
        return statistics.fmean(self.accuracy.values())

    @classmethod
    def read(cls, evaluations: Sequence[Mapping[str, Any]]) -> Result:
        """From what metrics have told. Raises `ValueError` where they tell no accuracy, or two of one kind."""
        found: dict[str, dict[str, float]] = {name: {} for name in ("accuracy", *BASELINES)}
        for evaluation in evaluations:
            for key, value in evaluation["values"].items():
                kind, _, name = key.rpartition("/")
                if name == "accuracy" and kind in found[name]:
                    raise ValueError(f"two metrics report '{key}'; leave one out")
                if kind and name in found:
                    found[name][kind] = float(value)
        accuracy = found.pop("accuracy")
        if not accuracy:
            raise ValueError("none reports a value KIND/accuracy; the metric `answers` does")
        return cls(accuracy, found)

    @classmethod
    def of(cls, run: Path) -> Result:
        """Of a finished run. Raises `RunError` where its evaluation is damaged."""
        path = run / EVALUATION
        try:
            return cls.read(read_json(path))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is not what an evaluation writes ({error}). Delete it and run again.") from error

    def same_questions(self, other: Result) -> bool:
        """Whether both have answered the same kinds of questions, as easy to guess."""
        return self.accuracy.keys() == other.accuracy.keys() and self.baselines == other.baselines


@dataclass(frozen=True)
class Comparison:
    """The results of all runs. `results`: variant → seed → result; each variant has all seeds."""

    key: str | None
    seeds: list[int]
    results: dict[str, dict[int, Result]]
    facts: dict[str, dict[str, Any]]
    """More about each variant: `recipe`, `name` (the recipe's), `value` where a key is varied."""

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.results))

    @property
    def kinds(self) -> list[str]:
        """The kinds of questions."""
        return list(self._any.accuracy)

    def values(self, variant: str, kind: str | None = None) -> list[float]:
        """Accuracies of a kind of question, or means over the kinds, one a seed."""
        results = [self.results[variant][seed] for seed in self.seeds]
        return [result.mean if kind is None else result.accuracy[kind] for result in results]

    def spread(self, variant: str, kind: str | None = None) -> Spread:
        """Mean over seeds and standard deviation (of a sample: n - 1)."""
        values = self.values(variant, kind)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def difference(self, variant: str, kind: str | None = None) -> Spread:
        """To the first variant, seed by seed: the mean difference and its standard error."""
        pairs = zip(self.values(variant, kind), self.values(self.first, kind), strict=True)
        gaps = [own - other for own, other in pairs]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        return statistics.fmean(gaps), error

    def baseline(self, name: str) -> dict[str | None, float]:
        """By kind of question, and under None the mean over kinds, where all have it."""
        found: dict[str | None, float] = dict(self._any.baselines[name].items())
        return {None: statistics.fmean(found.values()), **found} if len(found) == len(self.kinds) else found

    @property
    def _any(self) -> Result:
        """Of all results, which agree in kinds and baselines."""
        return self.results[self.first][self.seeds[0]]

    def table(self) -> tuple[str, list[str], list[list[str | int | None]], list[str]]:
        """Title, columns, rows and notes."""
        several = len(self.results) > 1
        columns = ["variant" if self.key is None else self.key.rpartition(".")[2], "runs", "mean"]
        columns += [*(["difference"] if several else []), *self.kinds]
        kinds: list[str | None] = [None, *self.kinds]
        rows: list[list[str | int | None]] = []
        for variant in self.results:
            spreads = [self.spread(variant, kind) for kind in kinds]
            if len(self.kinds) > _WIDE:
                spreads[1:] = [(mean, None) for mean, _ in spreads[1:]]
            cells: list[str | int | None] = [_cell(spread) for spread in spreads]
            if several:
                cells.insert(1, None if variant == self.first else _cell(self.difference(variant), "+"))
            rows.append([variant, len(self.seeds), *cells])
        for name, title in BASELINES.items():
            if known := self.baseline(name):
                cells = [_cell((known[kind], None)) if kind in known else None for kind in kinds]
                rows.append([title, None, cells[0], *([None] if several else []), *cells[1:]])
        notes = ["mean: of the kinds of questions, each counted alike"]
        if several:
            notes.append(f"difference: of the mean, to '{self.first}'")
        if len(self.seeds) > 1:
            error = "; of a difference: standard error of the mean difference between runs of the same seed"
            notes.append(f"±: standard deviation over seeds{error if several else ''}")
        varied = f", by {self.key}" if self.key else ""
        return f"held-out accuracy{varied}", columns, rows, notes

    def to_json(self) -> dict[str, Any]:
        """Every single value, and what the table shows."""
        variants = {}
        for variant, runs in self.results.items():
            variants[variant] = {
                **self.facts[variant],
                "runs": {str(seed): {"mean": run.mean, "accuracy": run.accuracy} for seed, run in runs.items()},
                "mean": _told(self.spread(variant), "deviation"),
                "accuracy": {kind: _told(self.spread(variant, kind), "deviation") for kind in self.kinds},
                "difference": {
                    "mean": _told(self.difference(variant), "error"),
                    "accuracy": {kind: _told(self.difference(variant, kind), "error") for kind in self.kinds},
                },
            }
        return {
            "foveate": __version__, "key": self.key, "seeds": self.seeds, "kinds": self.kinds, "first": self.first,
            "variants": variants, **{name: found for name, found in self._any.baselines.items() if found},
        }  # fmt: skip


def _cell(spread: Spread, sign: str = "") -> str:
    mean, uncertain = spread
    return f"{mean:{sign}.3f}" + ("" if uncertain is None else f" ±{uncertain:.3f}")


def _told(spread: Spread, uncertain: str) -> dict[str, float | None]:
    return {"mean": spread[0], uncertain: spread[1]}
