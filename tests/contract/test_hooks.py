"""The hooks: documented, used by core, implemented by somebody; kinds of names, and the catalogue of plugins."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate import hookspecs
from foveate.plugins import HOOKS, KINDS, installed_plugins, load_plugins
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.registry import load_registry
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.distributions import install, on_path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "foveate"

OBSERVER = """\
from foveate import hookimpl

HOOK_API = 1
SEEN = []

@hookimpl
def stage_started(run, stage):
    SEEN.append(("stage_started", stage, run.folder))

@hookimpl
def step_finished(run, stage, step, metrics):
    SEEN.append(("step_finished", stage, step, dict(metrics)))
    metrics["loss"] = "spoilt"

@hookimpl
def checkpoint_saved(stage, step, folder):
    SEEN.append(("checkpoint_saved", stage, step, folder))

@hookimpl
def stage_finished(run, stage):
    SEEN.append(("stage_finished", stage, run.folder))
"""


def specified() -> set[str]:
    """The names of the functions marked `@hookspec`, by the source."""
    tree = ast.parse((CORE / "hookspecs.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and "hookspec" in marks(node)}


def marks(node: ast.FunctionDef) -> set[str]:
    """The last names of a function's decorators."""
    plain = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
    return {ast.unparse(mark).split(".")[-1] for mark in plain}


def used(path: Path) -> Iterator[str]:
    """Hooks that a file calls: `….hook.NAME(…)`, and `subset_hook_caller("NAME", …)` with its f-strings filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if isinstance(node.func.value, ast.Attribute) and node.func.value.attr == "hook":
            yield node.func.attr
        elif node.func.attr == "subset_hook_caller":
            name = ast.unparse(node.args[0])
            if "{" in name:
                yield from [f"register_{kind}" for kind in KINDS]
            elif isinstance(node.args[0], ast.Constant):
                yield name.strip("'")


def implemented(path: Path) -> Iterator[str]:
    """Functions marked `@hookimpl`, in a file and in the sources that its strings hold."""
    texts, found = [path.read_text()], []
    while texts:
        try:
            tree = ast.parse(texts.pop())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "hookimpl" in marks(node):
                found.append(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "hookimpl" in node.value:
                texts.append(inspect.cleandoc(node.value))
    return iter(found)


@pytest.mark.parametrize("hook", sorted(specified()))
def test_a_hook_is_documented_used_and_implemented(hook: str) -> None:
    assert inspect.getdoc(getattr(hookspecs, hook)), f"{hook} says nothing of itself"
    assert hook in {name for path in CORE.rglob("*.py") for name in used(path)}, f"core never calls {hook}"
    places = [path for top in ("plugins", "tests", "examples") for path in (ROOT / top).rglob("*.py")]
    implementers = [CORE / "builtin.py", *places]
    assert hook in {name for path in implementers for name in implemented(path)}, f"nobody implements {hook}"


def test_every_call_of_a_hook_is_of_one_that_is_specified() -> None:
    assert {name for path in CORE.rglob("*.py") for name in used(path)} <= specified()


def test_hooks_and_kinds_are_each_others() -> None:
    assert set(HOOKS) == specified()
    assert {name.removeprefix("register_") for name in specified() if name.startswith("register_")} == set(KINDS)


def test_what_is_registered_by_each_kinds_hook_is_found(tmp_path: Path) -> None:
    calls = "\n".join(
        f"@foveate.hookimpl\ndef register_{kind}(register): register('mine-{kind}', dict)" for kind in KINDS
    )
    install(tmp_path / "site", "foveate-all", {"all_plugin.py": f"import foveate\nHOOK_API = 1\n{calls}\n"})
    with on_path(tmp_path / "site"):
        plugins = load_plugins()
        assert not plugins.broken
        for kind in KINDS:
            found = plugins.find(kind, f"mine-{kind}")
            assert found is not None and (found.kind, found.load(), found.owner) == (kind, dict, "foveate-all (all)")


def test_the_documentation_of_hooks_is_their_signature() -> None:
    """The docstrings name every argument that is not plain from its name."""
    for hook in specified():
        arguments = set(inspect.signature(getattr(hookspecs, hook)).parameters) - {"register", "run", "stage", "step"}
        text = inspect.getdoc(getattr(hookspecs, hook)) or ""
        assert all(f"`{name}`" in text for name in arguments), hook


def test_observers_see_a_run(tmp_path: Path, shared_corpus: Path) -> None:
    """In order, on the main process, with the lines of `metrics.jsonl`; what they do to a line does not reach it."""
    install(tmp_path / "site", "foveate-watch", {"watch_plugin.py": OBSERVER})
    content = recipe_dict(shared_corpus, output=str(tmp_path / "run"), checkpoint_every=2)
    content["stages"][0] |= {"max_steps": 3, "train": {"projector": 1e-3}}
    content["stages"].append({**content["stages"][0], "name": "later", "max_steps": 1})
    with on_path(tmp_path / "site"):
        run = train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True))
        import watch_plugin  # type: ignore[import-not-found]

        seen: list[tuple[Any, ...]] = watch_plugin.SEEN
    stages = {"only": 3, "later": 1}
    for stage, steps in stages.items():
        events = [event for event in seen if event[1] == stage]
        assert events[0] == ("stage_started", stage, run.folder)
        assert events[-1] == ("stage_finished", stage, run.folder)
        lines = [line for line in run.metrics() if line["stage"] == stage]
        finished = [event for event in events if event[0] == "step_finished"]
        assert [event[2] for event in finished] == list(range(1, steps + 1))
        for event, line in zip(finished, lines, strict=True):
            assert {**line, **event[3]} == line and event[3]["loss"] == line["loss"]
        saved = [event for event in events if event[0] == "checkpoint_saved"]
        assert saved and all(Path(event[3]).parent.parent.parent == run.folder for event in saved)
    assert [event[1] for event in seen] == sorted((event[1] for event in seen), key=list(stages).index)
    assert json.loads((run.folder / "manifest.json").read_text())["plugins"]["foveate-watch (watch)"] == "1.2.3"


def test_the_catalogue_and_what_is_installed_agree() -> None:
    """What a known plugin's distribution should register is registered."""
    plugins = installed_plugins()
    assert not plugins.broken
    missing = set()
    for kind, known in load_registry()[0].known.items():
        for name, plugin in known.items():
            found = plugins.find(kind, name)
            try:
                distribution(plugin.distribution)
            except PackageNotFoundError:
                continue
            if found is None:
                missing.add(name)
            else:
                assert found.owner.split(" ")[0] == plugin.distribution
    assert not missing, f"in registry.yaml, but their distribution does not register them: {missing}"


def test_the_catalogue_names_what_can_be_installed() -> None:
    for kind, known in load_registry()[0].known.items():
        for name, plugin in known.items():
            assert kind in KINDS and re.fullmatch(r"pip install (--upgrade )?[\w.-]+", plugin.install), name
            assert plugin.install.split()[-1] == plugin.distribution
            assert plugin.paper is None or re.fullmatch(r"\d{4}\.\d{5}", plugin.paper), name
            assert plugin.summary and len(plugin.summary) < 100, name


def test_foveates_own_plugins_go_through_the_entry_points() -> None:
    """Core names no class of a plugin: all that is known stands behind the entry points of its distribution."""
    own = [point for point in distribution("foveate").entry_points if point.group == "foveate"]
    loaded = {point.name: point.load() for point in own}
    assert {"core", "lab"} <= loaded.keys()
    plugins = installed_plugins()
    for name, module in loaded.items():
        assert isinstance(module, ModuleType) and plugins.manager.get_plugin(f"foveate ({name})") is module
