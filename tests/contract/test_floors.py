"""The house: imports go down, never up or sideways between floors; the core stays small; plugins stay outside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "foveate"
PLUGINS = ROOT / "plugins"

FLOORS: list[set[str]] = [
    {"errors", "types", "options", "processes"},
    {"objective", "hookspecs", "yaml_tree", "explain", "files"},
    {"plugins", "registry"},
    {"recipe_fields", "recipe", "recipe_file", "variants"},
    {"data"},
    {"model", "teachers", "targets"},
    {"text_loss", "forward_pass", "learner"},
    {"optim", "gradients", "precision", "checkpoint", "metrics", "run", "progress", "export", "tally"},
    {"data_room", "assembly", "session", "fitting", "rehearsal", "stage", "stage_checks", "plan", "training"}
    | {"loaded", "gallery", "report"},
    {"testing", "pytest_plugin", "cli", "plugin_cli", "show_cli", "export_cli", "scaffold", "recipe_docs"},
]
"""Modules of `foveate` by floor; a module imports from its own floor or below, without circles."""

OUTSIDE = {"__init__", "__main__", "builtin"}
"""`__init__` hands names on lazily; `builtin` is core's own plugin and names classes as strings."""

LIMIT = 7_650
"""Lines of code of floors 0 to 8; blank lines, comments and docstrings are free, so that nobody saves on them."""


def floor_of(module: str) -> int:
    for number, modules in enumerate(FLOORS):
        if module in modules:
            return number
    raise AssertionError(f"core/foveate/{module} has no floor: put it into FLOORS")


def core_files() -> list[Path]:
    return [path for path in sorted(CORE.rglob("*.py")) if room(path) not in OUTSIDE]


def room(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path, *, typing_too: bool = False) -> list[str]:
    """Dotted modules of foveate that a file imports, also inside functions; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing_too:
            skipped |= {child for statement in node.body for child in ast.walk(statement)}
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"foveate.{alias.name}" for alias in node.names]
            found += names if node.module == "foveate" else [node.module]
    return [name for name in found if name.split(".")[0] == "foveate" or name.startswith("foveate_")]


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(CORE)))
def test_imports_go_down(path: Path) -> None:
    own = floor_of(room(path))
    for name in imports(path):
        assert name.split(".")[0] == "foveate", f"core imports the plugin {name}"
        parts = name.split(".")
        if len(parts) < 2 or parts[1] not in {module for floor in FLOORS for module in floor}:
            continue  # a public name, or the version
        assert floor_of(parts[1]) <= own, f"{path.name} (floor {own}) imports {name} (floor {floor_of(parts[1])})"


def test_no_import_circles() -> None:
    graph: dict[str, set[str]] = {}
    names = {".".join(("foveate", *path.relative_to(CORE).with_suffix("").parts)): path for path in core_files()}
    for module, path in names.items():
        graph[module] = {name for name in imports(path) if name in names and name != module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circular import: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_core_is_small() -> None:
    below_the_command = {module for floor in FLOORS[:-1] for module in floor} | OUTSIDE
    lines = sum(code_lines(path) for path in CORE.rglob("*.py") if room(path) in below_the_command)
    assert lines < LIMIT, f"core has {lines} lines of code; the limit is {LIMIT}"


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank, nor a comment, nor part of a docstring."""
    source = path.read_text(encoding="utf-8")
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and is_text(node.value)]
    documentation = {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documentation
        for number, line in enumerate(source.splitlines(), 1)
    )


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda path: str(path.relative_to(PLUGINS)))
def test_plugins_import_public_names_only(path: Path) -> None:
    package = path.relative_to(PLUGINS).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top in {"foveate", package}, f"{path.name} imports another plugin: {name}"
        assert not name.startswith("foveate.training"), f"{path.name} imports the loop"
