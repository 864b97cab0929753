"""Trackers by accelerate's names: what they are told is `metrics.jsonl`, and wrong ones stop before anything begins."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import foveate.assembly
import foveate.cli
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe

Scalars = dict[str, list[tuple[int, float]]]


def two_stages(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    content = recipe_dict(corpus, output=str(folder / "run"), **changes)
    first = {**content["stages"][0], "max_steps": 2, "validate": {"data": content["stages"][0]["data"]}}
    content["stages"] = [{**first, "name": "align"}, {**first, "name": "instruct", "max_steps": 3}]
    return content


def told(folder: Path) -> Scalars:
    """Every scalar of every event file below `folder`."""
    found: Scalars = {}
    for file in folder.rglob("*tfevents*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found


def test_tensorboard_is_told_the_metrics(tmp_path: Path, shared_corpus: Path) -> None:
    content = two_stages(shared_corpus, tmp_path, trackers=["tensorboard"])
    run = train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True))
    expected: Scalars = {}
    for line in run.metrics():
        for name, value in line.items():
            if name not in ("stage", "step"):
                expected.setdefault(f"{line['stage']}/{name}", []).append((line["step"], value))
    found = told(tmp_path)
    assert set(found) == set(expected) and "align/loss" in found and "instruct/valid/loss/text" in found
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values]
        for (_, seen), (_, value) in zip(found[name], values, strict=True):
            assert math.isclose(seen, value, rel_tol=1e-6)
    assert all(run.folder in file.parents for file in tmp_path.rglob("*tfevents*"))


def test_a_run_with_trackers_resumes(tmp_path: Path, shared_corpus: Path) -> None:
    path = write_recipe(tmp_path, two_stages(shared_corpus, tmp_path, trackers=["tensorboard"]))
    lines = train(load_recipe(path), display=Display(quiet=True)).metrics()
    assert train(load_recipe(path), resume=True, display=Display(quiet=True)).metrics() == lines


def refused(
    command: str, content: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:  # fmt: skip
    def build_nothing(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was built")

    monkeypatch.setattr(foveate.assembly, "build_lmm", build_nothing)
    with pytest.raises(SystemExit) as leaving:
        foveate.cli.main([command, str(write_recipe(folder, content))])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and "Traceback" not in err and err.count("error: ") == 1
    assert not (folder / "run").exists()
    return err


@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_unknown_tracker(
    command: str, tmp_path: Path, shared_corpus: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    content = two_stages(shared_corpus, tmp_path, trackers=["tensorbord"])
    err = refused(command, content, tmp_path, capsys, monkeypatch)
    assert "trackers: unknown 'tensorbord'; did you mean 'tensorboard'?" in err


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_tracker_that_is_not_installed(
    command: str, tmp_path: Path, shared_corpus: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    missing = sorted({str(name) for name in LOGGER_TYPE_TO_CLASS} - {str(name) for name in get_available_trackers()})
    if not missing:
        pytest.skip("every tracker of accelerate is installed")
    content = two_stages(shared_corpus, tmp_path, trackers=["tensorboard", *missing])
    err = refused(command, content, tmp_path, capsys, monkeypatch)
    assert f"{len(missing)} problem" in err
    for name in missing:
        assert f"trackers: '{name}' is not installed: pip install " in err


def test_json_of_metrics_is_one_object_a_step(tmp_path: Path, shared_corpus: Path) -> None:
    run = train(load_recipe(write_recipe(tmp_path, two_stages(shared_corpus, tmp_path))), display=Display(quiet=True))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("align", 1), ("align", 2), ("instruct", 1), ("instruct", 2), ("instruct", 3),
    ]  # fmt: skip
    assert not list(tmp_path.rglob("*tfevents*"))
