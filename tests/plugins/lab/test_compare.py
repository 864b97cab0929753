"""`foveate compare`: what it trains and what not, its numbers beside those of each run, one error for what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import foveate.cli
import foveate.run
from foveate.metrics import Evaluation
from foveate_lab import compare_runs
from foveate_lab.answers import AnswersMetric
from foveate_lab.compare_variants import read_variants
from foveate_lab.compare_words import read_vary
from tests.conftest import Command
from tests.corpus import ENCODER, LLM, write_recipe

ROOT = Path(__file__).parents[3]
KEY = "objectives.victor.pool_size"
VARY = ("--vary", f"{KEY}=16,1", "--seeds", "0,3")
RUNS = ["16/seed-0", "1/seed-0", "16/seed-3", "1/seed-3"]
"""In the order in which they are trained."""


def content(**changes: Any) -> dict[str, Any]:
    """A step on the built-in digits, and their answers."""
    data = {"type": "digits", "cell_px": 8, "digit_px": 8, "size": 12}
    stage = {
        "name": "comprehend", "data": [{**data, "task": "captions"}], "batch_size": 4, "max_steps": 1,
        "train": {"projector": 1e-3, "llm": 1e-3, "victor": 1e-3},
    }  # fmt: skip
    return {
        "model": {"encoder": ENCODER, "projector": {"type": "mlp", "normalize": True}, "llm": LLM},
        "objectives": {"victor": {}},
        "stages": [stage],
        "evaluate": {"data": [{**data, "task": "questions", "split": "test"}], "metrics": ["answers"]},
        "hardware": {"workers": 0},
        **changes,
    }


def trained_inside(words: list[str]) -> int:
    """Trains in this process, which is quicker; as silently as another."""
    with pytest.raises(SystemExit) as leaving, contextlib.redirect_stdout(io.StringIO()):
        foveate.cli.main(words)
    return int(leaving.value.code or 0)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Two values, two seeds: the recipe, the folder, and what `--json` told. The first run is another process's."""
    folder = tmp_path_factory.mktemp("compared")
    recipe, out, told = write_recipe(folder, content(), "tiny.yaml"), folder / "pools", io.StringIO()
    words, wait_for = ["compare", str(recipe), *VARY, "--out", str(out), "--json"], compare_runs._Stop.wait_for

    def wait(self: Any, words: list[str]) -> int:
        return trained_inside(words) if (out / RUNS[0]).exists() else wait_for(self, words)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(compare_runs._Stop, "wait_for", wait)
        with pytest.raises(SystemExit) as leaving:
            foveate.cli.main(words)
    assert leaving.value.code == 0
    return recipe, out, told.getvalue()


@pytest.fixture
def copied(compared: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """The recipe, and the finished comparison where a test may change it."""
    shutil.copytree(compared[1], tmp_path / "pools")
    return compared[0], tmp_path / "pools"


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are trained in this process; the words of each."""
    started: list[list[str]] = []
    monkeypatch.setattr(
        compare_runs._Stop, "wait_for", lambda self, words: started.append(words) or trained_inside(words)
    )
    return started


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any, **options: Any) -> None:
        raise AssertionError(f"started {words}")

    monkeypatch.setattr("subprocess.Popen", refuse)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets the lines of a script stand for the process that trains."""

    def write(lines: str) -> None:
        script = tmp_path / "stand-in"
        script.write_text(f"#!{sys.executable} -S\n{lines}")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return write


def evaluated(run: Path) -> dict[str, float]:
    [evaluation] = json.loads((run / "evaluation.json").read_text())
    values: dict[str, float] = evaluation["values"]
    return values


def test_every_value_is_trained_with_every_seed(compared: tuple[Path, Path, str]) -> None:
    """And runs of a variant differ in their seed alone."""
    _, out, told = compared
    assert json.loads(told) == json.loads((out / "comparison.json").read_text())
    resolved = {name: yaml.safe_load((out / name / "recipe.yaml").read_text()) for name in RUNS}
    for name, recipe in resolved.items():
        size, _, seed = name.partition("/seed-")
        assert recipe["objectives"]["victor"].pop("pool_size") == int(size)
        assert recipe.pop("seed") == int(seed) and recipe.pop("output").endswith(name)
        assert recipe == resolved[RUNS[0]]
        run = json.loads(told)["variants"][size]["runs"][seed]
        accuracies = {key: value for key, value in evaluated(out / name).items() if key.endswith("/accuracy")}
        assert {f"{kind}/accuracy": value for kind, value in run["accuracy"].items()} == accuracies
    assert sorted(path.name for path in out.iterdir()) == ["1", "16", "comparison.json", "comparison.png"]
    assert Image.open(out / "comparison.png").width == 1000


@pytest.mark.usefixtures("no_process")
def test_the_numbers_are_those_of_the_runs(copied: tuple[Path, Path], foveate_command: Command) -> None:
    """Of runs that are there none is started; and these have answered something."""
    recipe, out = copied
    drawn, kinds = np.random.default_rng(0), ["colour", "comparison", "count", "identity", "presence"]
    for name in RUNS:
        [evaluation] = json.loads((out / name / "evaluation.json").read_text())
        evaluation["values"] |= {f"{kind}/accuracy": drawn.uniform() for kind in kinds}
        (out / name / "evaluation.json").write_text(json.dumps([evaluation]))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "seed" in str(path.parent)}
    status, shown, error = foveate_command("compare", recipe, *VARY, "--out", out)
    assert status == 0 and "4 runs" in error and "complete already: 4" in error and "train" not in error
    assert {path: path.stat().st_mtime_ns for path in before} == before

    values_VSK = np.array(
        [[[evaluated(out / f"{size}/seed-{seed}")[f"{kind}/accuracy"] for kind in kinds] for seed in (0, 3)]
         for size in (16, 1)]
    )  # fmt: skip
    values_VSK = np.concatenate([values_VSK.mean(2, keepdims=True), values_VSK], 2)
    means_VK, deviations_VK = values_VSK.mean(1), values_VSK.std(1, ddof=1)
    gaps_SK = values_VSK[1] - values_VSK[0]
    told = json.loads((out / "comparison.json").read_text())
    assert (told["key"], told["seeds"], told["first"], sorted(told["kinds"])) == (KEY, [0, 3], "16", kinds)
    for number, size in enumerate(("16", "1")):
        variant = told["variants"][size]
        assert (variant["value"], variant["recipe"]) == (int(size), str(recipe))
        found = [variant["mean"], *(variant["accuracy"][kind] for kind in kinds)]
        assert [entry["mean"] for entry in found] == pytest.approx(means_VK[number], abs=1e-12)
        assert [entry["deviation"] for entry in found] == pytest.approx(deviations_VK[number], abs=1e-12)
        gaps = [variant["difference"]["mean"], *(variant["difference"]["accuracy"][kind] for kind in kinds)]
        assert [entry["mean"] for entry in gaps] == pytest.approx(number * gaps_SK.mean(0), abs=1e-12)
        assert [entry["error"] for entry in gaps] == pytest.approx(number * gaps_SK.std(0, ddof=1) / 2**0.5, abs=1e-12)
    chance = {kind: evaluated(out / RUNS[0])[f"{kind}/chance"] for kind in kinds}
    assert told["chance"] == chance and set(told["majority"]) == set(kinds)

    rows = {cells[0]: cells[1:] for line in shown.splitlines() if len(cells := line.strip("│┃ ").split(" │ ")) > 2}
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    gap, error_of_gap = gaps_SK.mean(0)[0], gaps_SK.std(0, ddof=1)[0] / 2**0.5
    assert rows["1"][:3] == ["2", f"{means_VK[1, 0]:.3f} ±{deviations_VK[1, 0]:.3f}", f"{gap:+.3f} ±{error_of_gap:.3f}"]
    order = [kinds.index(kind) + 1 for kind in told["kinds"]]
    assert (
        rows["16"][3:] == [f"{means_VK[0, k]:.3f} ±{deviations_VK[0, k]:.3f}" for k in order] and rows["16"][2] == "–"
    )
    assert rows["chance"][1:] == [
        f"{np.mean([*chance.values()]):.3f}",
        "–",
        *(f"{chance[k]:.3f}" for k in told["kinds"]),
    ]
    assert "most frequent answer" in rows and "to '16'" in shown


def test_only_a_run_that_is_missing_is_trained(
    copied: tuple[Path, Path], inside: list[list[str]], foveate_command: Command
) -> None:
    recipe, out = copied
    lost = evaluated(out / "1/seed-3")
    shutil.rmtree(out / "1/seed-3")
    status, _, error = foveate_command("compare", recipe, *VARY, "--out", out)
    assert status == 0 and "complete already: 3" in error and "trained 1, seed 3: mean accuracy 0" in error, error
    assert "(4 of 4)" in error and len(inside) == 1 and f'output="{out}/1/seed-3"' in inside[0]
    assert evaluated(out / "1/seed-3") == lost


def test_with_another_evaluation_a_run_is_evaluated_anew_not_trained(
    copied: tuple[Path, Path], inside: list[list[str]], foveate_command: Command
) -> None:
    recipe, out = copied
    lines, before = (out / "1/seed-0/metrics.jsonl").read_text(), evaluated(out / "1/seed-0")
    words = ("--vary", f"{KEY}=1", "--out", out, "--set", "evaluate.data.0.size=30")
    status, _, error = foveate_command("compare", recipe, *words)
    assert status == 0 and len(inside) == 1, error
    assert (out / "1/seed-0/metrics.jsonl").read_text() == lines
    assert evaluated(out / "1/seed-0") != before


def test_a_stop_before_a_new_evaluation_leaves_no_old_one(
    copied: tuple[Path, Path], stand_in: Callable[[str], None], foveate_command: Command
) -> None:
    recipe, out = copied
    stand_in("raise SystemExit(130)")
    words = ("--vary", f"{KEY}=1", "--out", out, "--set", "evaluate.data.0.size=30")
    status, _, error = foveate_command("compare", recipe, *words)
    assert status == 130 and f"stopped in {out}/1/seed-0; the same `foveate compare` goes on" in error
    assert not (out / "1/seed-0/evaluation.json").exists()


def test_ctrl_c_waits_for_the_run_and_trains_no_other(
    tmp_path: Path, stand_in: Callable[[str], None], foveate_command: Command
) -> None:
    """The signal reaches this process alone; it is handed on, and the run takes its time to end."""
    recipe, log = write_recipe(tmp_path, content(), "tiny.yaml"), tmp_path / "log"
    stand_in(
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "got = signal.sigtimedwait([signal.SIGINT], 20)\n"
        "silent = os.path.samestat(os.fstat(1), os.stat(os.devnull))\n"
        f"print(got is not None, silent, file=open({str(log)!r}, 'a'))\n"
    )
    status, shown, error = foveate_command("compare", recipe, *VARY, "--out", tmp_path / "out")
    assert (status, shown, log.read_text()) == (130, "", "True True\n")
    assert "error" not in error and error.splitlines()[-1].startswith(f"stopped in {tmp_path}/out/16/seed-0")


def test_a_run_that_fails_is_named(tmp_path: Path, stand_in: Callable[[str], None], foveate_command: Command) -> None:
    recipe = write_recipe(tmp_path, content(), "tiny.yaml")
    stand_in("raise SystemExit(1)")
    status, _, error = foveate_command("compare", recipe, *VARY, "--out", tmp_path / "out")
    assert status == 2 and f"error: the run {tmp_path}/out/16/seed-0 (16, seed 0) has failed" in error


def test_a_recipe_that_is_changed_meanwhile_is_told(
    tmp_path: Path, inside: list[list[str]], monkeypatch: pytest.MonkeyPatch, foveate_command: Command
) -> None:
    recipe, wait_for = write_recipe(tmp_path, content(), "tiny.yaml"), compare_runs._Stop.wait_for

    def edit(self: Any, words: list[str]) -> int:
        write_recipe(tmp_path, content(text={"weight": 0.5}), "tiny.yaml")
        return wait_for(self, words)

    monkeypatch.setattr(compare_runs._Stop, "wait_for", edit)
    status, _, error = foveate_command("compare", recipe, "--out", tmp_path / "out")
    assert status == 2 and f"{recipe} was changed meanwhile" in error and len(inside) == 1


def test_recipes_are_compared_by_their_names(
    tmp_path: Path, inside: list[list[str]], monkeypatch: pytest.MonkeyPatch, foveate_command: Command
) -> None:
    """In the default folder; with one seed there is no ±."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, content(), "seeing.yaml")
    write_recipe(tmp_path, {"extends": "seeing.yaml", "objectives": {"victor": False}}, "text_only.yaml")
    status, shown, error = foveate_command("compare", "text_only.yaml", "seeing.yaml", "--seeds", "5")
    assert status == 0, error
    folder = tmp_path / "runs" / "text_only-and-1-more"
    told = json.loads((folder / "comparison.json").read_text())
    assert list(told["variants"]) == ["text_only", "seeing"] and told["key"] is None and len(inside) == 2
    assert all("value" not in variant and variant["mean"]["deviation"] is None for variant in told["variants"].values())
    assert yaml.safe_load((folder / "text_only/seed-5/recipe.yaml").read_text())["objectives"] == {}
    assert "±" not in shown and "seeing" in shown and "difference: of the mean, to 'text_only'" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--vary", "objectives.victor.pool=1,2"), "with objectives.victor.pool=1: 1 problem in the recipe"),
        (("--vary", f"{KEY}=1,,2"), "--vary takes KEY=A,B"),
        (("--vary", f"{KEY}="), "--vary takes KEY=A,B"),
        (("--vary", KEY), "--vary takes KEY=A,B"),
        (("--vary", f"{KEY}=4,0"), f"with {KEY}=0: 1 problem"),
        (("--vary", "text.weight=1e-3,0.001"), "'1e-3' and '0.001' are the same recipe"),
        (("--vary", "stages.0.template=plain,'plain'"), "two variants would have the folder 'plain'"),
        (("--vary", "stages.0.system=+,b"), "'+' cannot name a folder"),
        (("--vary", "evaluate.data.0.size=4,8"), "are not evaluated alike (evaluate.data.0.size: 4 → 8)"),
        (("--vary", "seed=0,1"), "--vary seed: give --seeds instead"),
        (("--set", "seed=3"), "--set seed: give --seeds instead"),
        (("--set", "output=runs"), "--set output: give --out instead"),
        (("--set", "name=comparison.json"), "is the name of a file beside the runs"),
        (("--vary", f"{KEY}=1,2", "--set", f"{KEY}=3"), f"--set {KEY} would be lost"),
        (("--seeds", "0,x"), "--seeds takes whole numbers"),
        (("--seeds", "1,01"), "one stands there twice"),
        (("--set", "evaluate=null"), "has no `evaluate`"),
    ],
)
@pytest.mark.usefixtures("no_process")
def test_what_cannot_be_compared_is_told_before_anything_is_trained(
    tmp_path: Path, foveate_command: Command, words: tuple[str, ...], told: str
) -> None:
    recipe = write_recipe(tmp_path, content(), "tiny.yaml")
    status, shown, error = foveate_command("compare", recipe, "--out", tmp_path / "out", *words)
    assert (status, shown) == (2, "") and told in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_process")
def test_two_recipes_that_do_not_compare_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foveate_command: Command
) -> None:
    first = write_recipe(tmp_path, content(name="Tiny"), "first.yaml")
    second = write_recipe(tmp_path, content(name="tiny", text={"weight": 2}), "second.yaml")
    out = ("--out", tmp_path / "out")
    status, _, error = foveate_command("compare", first, second, *out)
    assert status == 2 and f"the folder 'tiny': {first}, and {second}. Give the recipes other names" in error
    write_recipe(tmp_path, content(evaluate={**content()["evaluate"], "template": "plain"}), "second.yaml")
    status, _, error = foveate_command("compare", first, second, *out)
    assert status == 2 and "'Tiny' and 'second' are not evaluated alike (evaluate.template: None → plain)" in error
    monkeypatch.setattr(AnswersMetric, "summary", lambda self: Evaluation("", (), [], {"loss": 0.5}))
    status, _, error = foveate_command("compare", first, *out)
    assert status == 2 and "metrics answers: none reports a value KIND/accuracy" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = foveate_command("compare", first, *out)
    assert status == 2 and "launched as 2 processes" in error and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_process")
def test_folders_that_hold_something_else_are_told(copied: tuple[Path, Path], foveate_command: Command) -> None:
    recipe, out = copied
    words = ("compare", recipe, "--vary", f"{KEY}=1")
    status, _, error = foveate_command(*words, "--out", out, "--set", "text.weight=0.5")
    assert status == 2 and f"{out}/1/seed-0 holds a run of another recipe (text.weight: 1.0 → 0.5)" in error
    status, _, error = foveate_command(*words, "--out", out / "1/seed-0")
    assert status == 2 and "is itself a run" in error
    status, _, error = foveate_command(*words, "--out", out / "comparison.png")
    assert status == 2 and "cannot be made" in error
    (out / "1/seed-0/evaluation.json").write_text("[1]")
    status, _, error = foveate_command(*words, "--out", out)
    assert status == 2 and "1/seed-0/evaluation.json is not what an evaluation writes" in error


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("file", ["manifest.json", "evaluation.json"])
def test_runs_on_data_that_have_changed_do_not_compare(
    copied: tuple[Path, Path], file: str, foveate_command: Command
) -> None:
    recipe, out = copied
    path = out / "1/seed-3" / file
    told = json.loads(path.read_text())
    if file == "manifest.json":
        told["data"]["comprehend.0"] = "other"
    else:
        told[0]["values"]["count/chance"] += 0.01
    path.write_text(json.dumps(told))
    status, _, error = foveate_command("compare", recipe, *VARY, "--out", out)
    assert status == 2 and f"{path.parent}: the data" in error


def braces(word: str) -> list[str]:
    """As a shell expands one `{…,…}`."""
    before, brace, rest = word.partition("{")
    inner, _, after = rest.partition("}")
    return [before + part + after for part in inner.split(",")] if brace else [word]


def test_the_commands_of_the_page_read_their_recipes() -> None:
    page = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("foveate compare examples/")]
    assert len(commands) == 4
    for _, _, *words in commands:
        recipes = [ROOT / path for word in words for path in braces(word) if path.endswith(".yaml")]
        vary = read_vary(words[words.index("--vary") + 1]) if "--vary" in words else None
        variants = read_variants(recipes, vary, ())
        assert len(variants) == len(recipes) * len(vary.values if vary else "1")


def test_a_run_is_complete_whatever_a_resumed_one_may_change() -> None:
    assert compare_runs.INDIFFERENT | {"evaluate"} == foveate.run._MAY_CHANGE
