"""The metric `answers`: numbers from answers made by hand, and the table that a run ends with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from foveate.metrics import Answer, Evaluation
from foveate.plugins import load_plugins
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from foveate_lab.answers import AnswersMetric
from tests.corpus import ENCODER, LLM, write_recipe


def answered(kind: str | None, value: str | None, exact: bool, blind: bool, chance: float | None = None) -> Answer:
    told = {"kind": kind, "answer": value, "chance": chance}
    return Answer("s", {key: entry for key, entry in told.items() if entry is not None}, exact, blind)


def summed(*answers: Answer) -> Evaluation:
    metric = AnswersMetric(AnswersMetric.Options())
    for answer in answers:
        metric.update([answer])
    return metric.summary()


def row(evaluation: Evaluation, kind: str) -> dict[str, Any]:
    return dict(zip(evaluation.columns, next(row for row in evaluation.rows if row[0] == kind), strict=True))


def margin(evaluation: Evaluation) -> float:
    return float(row(evaluation, "a")["95 %"].removeprefix("±"))


def test_shares_by_kind_beside_their_baselines() -> None:
    found = summed(
        answered("count", "2", True, True, 0.1),
        answered("count", "2", True, False, 0.1),
        answered("presence", "yes", False, False, 0.5),
        answered("count", "2", True, False, 0.1),
        answered("count", "0", False, False, 0.1),
    )
    assert found.values == {
        "count/accuracy": 0.75, "count/blind": 0.25, "count/majority": 0.75, "count/chance": pytest.approx(0.1),
        "presence/accuracy": 0.0, "presence/blind": 0.0, "presence/majority": 1.0, "presence/chance": 0.5,
    }  # fmt: skip
    assert [entry[0] for entry in found.rows] == ["count", "presence"]
    count = row(found, "count")
    assert (count["n"], count["accuracy"], count["blind"], count["majority"]) == (4, 0.75, 0.25, 0.75)


def test_the_margin_is_that_of_a_share_and_never_nothing() -> None:
    many = summed(*(answered("a", "x", number < 160, False) for number in range(200)))
    assert margin(many) == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 200), abs=1e-3)
    for exact in (True, False):
        certain = summed(*(answered("a", "x", exact, False) for _ in range(50)))
        assert 0 < margin(certain) < 0.05


def test_answers_without_kind_value_or_chance() -> None:
    found = summed(answered(None, None, True, False), answered(None, None, False, False))
    assert found.values == {"all/accuracy": 0.5, "all/blind": 0.0}
    assert row(found, "all")["majority"] is None and row(found, "all")["chance"] is None


def test_no_answer_is_an_empty_table() -> None:
    assert summed().rows == [] and summed().values == {}


def test_it_is_registered_and_runs_the_blind_baseline() -> None:
    found = load_plugins().find("metrics", "answers")
    assert found is not None and found.load() is AnswersMetric and AnswersMetric.blind


def digits_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    llm = {**LLM, "config": {**LLM["config"], "hidden_size": 48}}  # type: ignore[dict-item]
    stage = {
        "name": "only",
        "data": [{"type": "digits", "task": "questions", "size": 64, "questions": 2}],
        "train": {"encoder": 3e-3, "projector": 3e-3, "llm": 3e-3},
        "batch_size": 16,
        "max_steps": 3,
    }
    held_out = {"type": "digits", "split": "test", "task": "questions", "size": 50}
    return {
        "name": "test",
        "output": str(folder / "run"),
        "model": {"encoder": ENCODER, "projector": {"depth": 2}, "llm": llm},
        "stages": [stage],
        "hardware": {"workers": 0},
        "evaluate": {"data": [held_out], "metrics": ["answers"]},
        **changes,
    }


def test_a_run_ends_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(load_recipe(write_recipe(tmp_path, digits_recipe(tmp_path))), display=Display())
    shown = capsys.readouterr().out
    (told,) = json.loads((run.folder / "evaluation.json").read_text())
    kinds = ["colour", "comparison", "count", "identity", "presence"]
    assert [entry[0] for entry in told["rows"]] == kinds and [entry[1] for entry in told["rows"]] == [10] * 5
    assert set(told["values"]) == {
        f"{kind}/{name}" for kind in kinds for name in ("accuracy", "blind", "majority", "chance")
    }
    assert told["values"]["identity/chance"] == pytest.approx(0.1)
    table = shown[shown.index(told["title"]) :]
    assert all(column in table for column in told["columns"])
    for entry in told["rows"]:
        line = next(line for line in table.splitlines() if entry[0] in line)
        assert all(f"{number:.3f}" in line for number in entry[2:] if isinstance(number, float))


def test_a_model_that_has_learnt_its_pictures_by_heart_sees_them(tmp_path: Path) -> None:
    """One scene's worth of memory is not blind: the same pictures are answered, swapped ones are not."""
    one_kind = {"type": "digits", "task": "questions", "size": 8, "kinds": ["identity"], "density": 1.0}
    recipe = digits_recipe(tmp_path)
    recipe["stages"][0] |= {"data": [one_kind], "batch_size": 8, "max_steps": 60, "schedule": "constant"}
    recipe["evaluate"]["data"] = [one_kind]
    run = train(load_recipe(write_recipe(tmp_path, recipe)), display=Display(quiet=True))
    (told,) = json.loads((run.folder / "evaluation.json").read_text())
    assert told["values"]["identity/accuracy"] == 1.0
    assert told["values"]["identity/blind"] < 1.0
