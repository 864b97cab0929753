"""The template of a plugin, and what `foveate new-plugin` makes of it: small, public, tested, and ready to train."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import foveate
from foveate.plugins import load_plugins
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.registry import load_registry
from foveate.scaffold import PluginNames, write_plugin
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.distributions import install_project, on_path

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "examples" / "plugin_template"
NAME = "edge-map_2"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new plugin."""
    return write_plugin(NAME, tmp_path_factory.mktemp("new"), load_plugins(), load_registry()[0])[1]


def fences(page: str, language: str) -> list[str]:
    """The code blocks of a page in Markdown."""
    start = f"{language}\n"
    return [block.removeprefix(start) for block in page.split("```")[1::2] if block.startswith(start)]


def test_the_template_is_at_most_sixty_lines() -> None:
    lines = [line for path in (TEMPLATE / "foveate_align").rglob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) <= 60


def test_the_template_uses_public_names_only() -> None:
    for path in TEMPLATE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "foveate":
                assert {alias.name for alias in node.names} <= set(foveate.__all__), path
            elif isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert not any(name.startswith("foveate.") and name != "foveate.testing" for name in modules), path


def test_the_wheel_takes_the_template_along() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"]["examples/plugin_template"] == "foveate/plugin_template"


def test_a_new_plugin_is_the_template_with_other_names(written: Path) -> None:
    names = PluginNames.of(NAME)
    assert names == ("edge-map_2", "foveate-edge-map-2", "foveate_edge_map_2", "EdgeMap2Loss")
    assert {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()} == {
        "pyproject.toml", "README.md", "foveate_edge_map_2/__init__.py", "foveate_edge_map_2/objective.py",
        "tests/test_objective.py",
    }  # fmt: skip
    for path in filter(Path.is_file, written.rglob("*")):
        back = str(path.relative_to(written)).replace(names.package, "foveate_align")
        text, template = path.read_text(), (TEMPLATE / back).read_text()
        assert "align" not in text.replace("alignment", "") and "Align" not in text, path
        for new, old in zip(names, ("align", "foveate-align", "foveate_align", "AlignLoss"), strict=True):
            text = text.replace(new, old)
        assert text == template
    said = tomllib.loads((written / "pyproject.toml").read_text())
    assert said["project"]["name"] == names.distribution == written.name
    assert said["project"]["entry-points"]["foveate"] == {NAME: names.package}


def test_it_passes_its_tests_and_appears(written: Path, tmp_path: Path) -> None:
    """As installed beside foveate: its own tests, the conformance kit among them, and the list of plugins."""
    for project in (TEMPLATE, written):
        install_project(tmp_path, project)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    command = [sys.executable, "-B", "-m", "pytest", *options, str(written / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    command = [sys.executable, "-m", "foveate", "plugins", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    found = {plugin["distribution"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    for distribution, name in (("foveate-align", "align"), ("foveate-edge-map-2", NAME)):
        assert found[distribution]["state"] == "ok"
        assert found[distribution]["registers"] == {"objectives": [name]}


def test_a_new_plugin_learns_by_the_lines_of_its_readme(written: Path, tmp_path: Path, shared_corpus: Path) -> None:
    """The log has what the README says of it, and the cosine rises: in every step, the whole corpus."""
    install_project(tmp_path / "site", written)
    (lines,) = fences((written / "README.md").read_text(), "yaml")
    pasted = yaml.safe_load(lines)
    content = recipe_dict(shared_corpus, output=str(tmp_path / "run"), objectives=pasted["objectives"])
    content["stages"][0] |= {"train": {**pasted["stages"][0]["train"], NAME: 3e-2}, "max_steps": 12, "batch_size": 48}
    with on_path(tmp_path / "site"):
        lines_of_run = train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True)).metrics()
    losses, cosines = ([line[key] for line in lines_of_run] for key in (f"loss/{NAME}", f"{NAME}/cosine"))
    assert losses == pytest.approx([1 - cosine for cosine in cosines], rel=1e-4)
    assert cosines[-1] > cosines[0] + 0.2
