"""Every example is a recipe that loads and plans; `import foveate` answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveate.cli
from foveate.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if "tasks" not in path.parts)  # lmms-eval's


def test_there_are_examples() -> None:
    assert ROOT / "examples" / "quickstart.yaml" in EXAMPLES


HERE = [path for path in EXAMPLES if path.parent.name != "recipes"]
"""Those whose data come with foveate; the others name the data of papers."""


def planned(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as leaving:
        foveate.cli.main(["plan", str(path), "--json", *flags])
    captured = capsys.readouterr()
    assert leaving.value.code == 0, captured.err
    plan: dict[str, Any] = json.loads(captured.out)
    assert all(any(row["trained"] for row in stage["parts"]) for stage in plan["stages"])
    return plan


@pytest.mark.parametrize("path", HERE, ids=[str(path.relative_to(ROOT)) for path in HERE])
def test_an_example_loads_and_plans(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, plan = load_recipe(path), planned(path, capsys)
    assert [stage["name"] for stage in plan["stages"]] == [stage.name for stage in recipe.stages]
    assert all(stage["steps"] > 0 and stage["samples"] > 0 for stage in plan["stages"])
    assert list(tmp_path.iterdir()) == []


OTHERS = sorted({*EXAMPLES} - {*HERE})


@pytest.mark.parametrize("path", OTHERS, ids=[path.stem for path in OTHERS])
def test_a_papers_recipe_plans_without_weights_and_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a baseline is its twin: the same parts at the same rates, but for what was taken out."""
    monkeypatch.chdir(tmp_path)
    plan = planned(path, capsys, "--no-data")
    if path.stem.endswith("_baseline"):
        whole = planned(path.with_name(path.name.replace("_baseline", "")), capsys, "--no-data")
        for stage, twin in zip(whole["stages"], plan["stages"], strict=True):
            rest = [row for row in stage["parts"] if row["part"] in ("encoder", "projector", "llm")]
            assert {**stage, "parts": rest} == twin
        assert sum(len(stage["parts"]) for stage in whole["stages"]) > sum(len(s["parts"]) for s in plan["stages"])
    assert list(tmp_path.iterdir()) == []


def test_combos_are_every_pair_and_none_of_the_quickstarts_objectives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else differs: stages, data, rates, and the objectives that are left."""
    monkeypatch.chdir(tmp_path)
    whole, objectives, found = ROOT / "examples" / "quickstart.yaml", {"ross", "victor", "asvr"}, set()
    plan, resolved = planned(whole, capsys), load_recipe(whole).resolved()
    for path in sorted((ROOT / "examples" / "combos").glob("*.yaml")):
        recipe = load_recipe(path)
        left, part = {*recipe.objectives}, recipe.resolved()
        assert len(path.read_text().splitlines()) == 4 and left <= objectives
        assert part["objectives"] == {name: resolved["objectives"][name] for name in objectives & left}
        for key in ("model", "evaluate", "seed", "text", "precision"):
            assert part[key] == resolved[key]
        for stage, twin in zip(plan["stages"], planned(path, capsys)["stages"], strict=True):
            assert {**stage, "parts": [row for row in stage["parts"] if row["part"] not in objectives - left]} == twin
        found.add(frozenset(left))
    assert found == {frozenset(objectives - {name}) for name in objectives} | {frozenset()}


def test_the_header_of_an_example_says_how_to_run_it() -> None:
    for path in EXAMPLES:
        comments = [line for line in path.read_text().splitlines()[:6] if line.startswith("#")]
        assert any(f"foveate train {path.relative_to(ROOT)}" in line for line in comments), path


def test_importing_foveate_imports_nothing_heavy() -> None:
    code = "import sys, foveate; print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_public_name_can_be_imported() -> None:
    code = "import foveate; [getattr(foveate, name) for name in foveate.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
