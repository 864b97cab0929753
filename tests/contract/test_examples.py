"""Every example is a recipe that loads and plans; `import foveate` answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import foveate.cli
from foveate.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def test_there_are_examples() -> None:
    assert ROOT / "examples" / "quickstart.yaml" in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=[str(path.relative_to(ROOT)) for path in EXAMPLES])
def test_an_example_loads_and_plans(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    with pytest.raises(SystemExit) as leaving:
        foveate.cli.main(["plan", str(path), "--json"])
    captured = capsys.readouterr()
    assert leaving.value.code == 0, captured.err
    plan = json.loads(captured.out)
    assert [stage["name"] for stage in plan["stages"]] == [stage.name for stage in recipe.stages]
    for stage in plan["stages"]:
        assert stage["steps"] > 0 and stage["samples"] > 0
        assert any(row["trained"] for row in stage["parts"])
    assert list(tmp_path.iterdir()) == []


def test_the_header_of_an_example_says_how_to_run_it() -> None:
    for path in EXAMPLES:
        comments = [line for line in path.read_text().splitlines()[:6] if line.startswith("#")]
        assert any(f"foveate train examples/{path.name}" in line for line in comments), path


def test_importing_foveate_imports_nothing_heavy() -> None:
    code = "import sys, foveate; print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_public_name_can_be_imported() -> None:
    code = "import foveate; [getattr(foveate, name) for name in foveate.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
