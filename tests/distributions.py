"""Distributions for tests: packages with a real `.dist-info`, found by entry points as installed ones are."""

from __future__ import annotations

import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from foveate.plugins import installed_plugins

HOOKS = "import foveate\nHOOK_API = 1\n"
"""How the module of a sound plugin begins."""

OBJECTIVE = """\
import foveate
from pydantic import Field
from torch import nn

class Objective(foveate.VisionObjective):
    '''Pulls the visual outputs to zero.'''

    class Options(foveate.ObjectiveOptions):
        power: float = Field(2.0, gt=0, description="Exponent.")

    def __init__(self, options, context):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 1)

    def loss(self, outputs, targets, state):
        return foveate.LossTerm(self.head(outputs.states()).abs().pow(self.options.power).sum())
"""
"""A module with an objective, `Objective`."""


def registering(**objectives: str) -> str:
    """The module of a plugin that registers objectives: name → what stands behind it, as Python."""
    calls = "\n".join(f"    register({name!r}, {target})" for name, target in objectives.items())
    return f"{HOOKS}@foveate.hookimpl\ndef register_objectives(register):\n{calls}\n"


def install(site: Path, distribution: str, modules: Mapping[str, str], **points: str) -> None:
    """Into the folder `site`, as pip does: `modules` (file → source) and metadata; `points`: entry point → module."""
    for file, source in modules.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(textwrap.dedent(source))
    _describe(site, distribution, "1.2.3", points or {distribution.split("-")[-1]: next(iter(modules)).split(".")[0]})


def install_project(site: Path, project: Path) -> None:
    """The same for a folder with a `pyproject.toml` of hatchling, as `pip install` would."""
    said = tomllib.loads((project / "pyproject.toml").read_text())
    for package in said["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(project / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    _describe(site, said["project"]["name"], said["project"]["version"], said["project"]["entry-points"]["foveate"])


def _describe(site: Path, distribution: str, version: str, points: Mapping[str, str]) -> None:
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{name} = {module}" for name, module in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[foveate]", *lines, ""]))


@contextmanager
def on_path(site: Path) -> Iterator[Path]:
    """Inside, `site` is on the path and plugins are discovered anew; after it, nothing of it is left in the process."""
    site.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        installed_plugins.cache_clear()
        before = set(sys.modules)
        yield site
    for name in set(sys.modules) - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    installed_plugins.cache_clear()
