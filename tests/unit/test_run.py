"""The run folder: what is in the way, what may change on resume, and a metrics file that survives crashes."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from foveate.errors import RunError
from foveate.recipe_file import load_recipe
from foveate.run import Run
from tests.corpus import recipe_dict, write_corpus, write_recipe

DATA = {"align.0": "abc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_corpus(tmp_path, samples=2)


def start(folder: Path, *, resume: bool = False, data: dict[str, str] | None = None, **changes: Any) -> Run:
    recipe = load_recipe(write_recipe(folder, recipe_dict(folder, **changes)))
    return Run.start(recipe, data or DATA, resume=resume)


def test_a_new_run_writes_what_it_is(folder: Path) -> None:
    run = start(folder)
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == version("torch") == torch.__version__.split("+")[0]
    assert manifest["versions"]["foveate"] == version("foveate")
    assert manifest["data"] == DATA and manifest["name"] == "test" and manifest["resumed"] == []
    assert any(name.startswith("foveate (core)") for name in manifest["plugins"])
    again = load_recipe(run.folder / "recipe.yaml")
    assert again.resolved() == load_recipe(folder / "recipe.yaml").resolved() == run.recipe()


def test_an_existing_run_names_the_three_ways_out(folder: Path) -> None:
    run = start(folder)
    before = (run.folder / "manifest.json").read_bytes()
    with pytest.raises(RunError) as caught:
        start(folder)
    assert all(way in str(caught.value) for way in ("--resume", "--set output=", f"rm -r {run.folder}"))
    assert (run.folder / "manifest.json").read_bytes() == before


def test_a_folder_of_something_else_is_never_touched(folder: Path) -> None:
    target = folder / "run"
    target.mkdir()
    Run.check(target, resume=False)  # empty: nothing to lose
    (target / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(RunError, match="exists and is not a run"):
            start(folder, resume=resume)
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]
    file = folder / "file"
    file.write_text("x")
    with pytest.raises(RunError, match="not a run"):
        Run.check(file, resume=False)


def test_resuming_what_has_not_begun_begins_it(folder: Path) -> None:
    assert (start(folder, resume=True).folder / "recipe.yaml").is_file()


def test_a_resumed_run_may_change_its_hardware_but_not_what_is_learned(folder: Path) -> None:
    run = start(folder)
    start(folder, resume=True, hardware={"workers": 1}, checkpoint_every=3, log_every=1)
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert len(manifest["resumed"]) == 1
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["checkpoint_every"] == 3

    stages = recipe_dict(folder)["stages"]
    stages[0]["train"]["llm"] = 5e-4
    with pytest.raises(RunError, match=r"recipe is not the one .*stages\.0\.train\.llm\.lr: 0\.001 → 0\.0005"):
        start(folder, resume=True, stages=stages)
    with pytest.raises(RunError, match=r"data is not the one .*align\.0: abc → xyz"):
        start(folder, resume=True, data={"align.0": "xyz"})


def test_only_the_main_process_writes(folder: Path) -> None:
    run = Run.start(load_recipe(write_recipe(folder, recipe_dict(folder))), DATA, main=False)
    run.log({"stage": "align", "step": 1})
    run.cut_metrics(["align"], "align", 0)
    assert not run.folder.exists()


def test_metrics_are_a_line_a_step_and_never_invalid_json(folder: Path) -> None:
    run = start(folder)
    run.log({"stage": "align", "step": 1, "loss": 0.1 + 0.2, "é": 3})
    run.log({"stage": "align", "step": 2, "loss": math.inf, "x": math.nan})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert strict == run.metrics()
    assert strict[0]["loss"] == 0.1 + 0.2 and strict[1] == {"stage": "align", "step": 2, "loss": None, "x": None}


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [("instruct", 1, 4), ("align", 2, 2), ("align", 0, 0), ("instruct", 0, 3), ("instruct", 9, 5)],
)
def test_a_resumed_run_goes_on_from_a_clean_metrics_file(folder: Path, stage: str, step: int, kept: int) -> None:
    run = start(folder)
    written = [("align", 1), ("align", 2), ("align", 3), ("instruct", 1), ("instruct", 2)]
    for name, number in written:
        run.log({"stage": name, "step": number, "loss": 1.0 / number})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "instruct", "st')  # the crash came in the middle of a line
    run.cut_metrics(["align", "instruct"], stage, step)
    assert [(line["stage"], line["step"]) for line in run.metrics()] == written[:kept]
    run.log({"stage": stage, "step": step + 1})
    assert len(run.metrics()) == kept + 1


def test_a_run_that_was_killed_before_it_began_is_no_obstacle(tmp_path: Path) -> None:
    """The recipe is written last: a manifest alone, or what was being written, is nothing to lose."""
    for name in ("manifest.json", ".manifest.json.tmp", ".recipe.yaml.tmp"):
        (tmp_path / name).write_text("{")
    Run.check(tmp_path, resume=False)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="is not a run"):
        Run.check(tmp_path, resume=True)
