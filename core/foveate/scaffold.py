"""`foveate new-plugin`: a distribution made from the template, its names replaced."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from foveate.errors import UserError
from foveate.files import atomic_folder
from foveate.plugins import Plugins
from foveate.recipe_fields import RESERVED
from foveate.registry import Registry

_SUFFIXES = {".py", ".toml", ".md"}
_NOT_NAMES = {*RESERVED, "true", "false", "null"}
"""Parts of a model, which recipes name, and what YAML does not read as text."""


class PluginNames(NamedTuple):
    """How everything of a plugin is called."""

    objective: str
    distribution: str
    package: str
    cls: str

    @classmethod
    def of(cls, name: str) -> PluginNames:
        """`edge-map` → `foveate-edge-map`, `foveate_edge_map`, `EdgeMapLoss`. Raises `UserError` for a bad name."""
        if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
            raise UserError(f"'{name}' cannot name a plugin: small letters, digits, and - or _ between them")
        if name in _NOT_NAMES:
            raise UserError(f"'{name}' cannot name an objective, it means something else in a recipe; choose another")
        words = re.split("[-_]", name)
        camel = "".join(word.capitalize() for word in words)
        return cls(name, f"foveate-{'-'.join(words)}", f"foveate_{'_'.join(words)}", f"{camel}Loss")


def template_folder() -> Path:
    """The template that comes with foveate: in the installed package, or beside `core/` in a checkout."""
    package = Path(__file__).resolve().parent
    places = package / "plugin_template", package.parents[1] / "examples" / "plugin_template"
    return next(place for place in places if place.is_dir())


def write_plugin(name: str, parent: Path, plugins: Plugins, registry: Registry) -> tuple[PluginNames, Path]:
    """Writes the distribution `foveate-NAME` into `parent`, complete or not at all; returns its names and its folder.

    Raises `UserError` where `name` cannot be one or is taken, or where the folder exists; `RunError` where nothing can
    be written.
    """
    names = PluginNames.of(name)
    _refuse_taken(names, plugins, registry)
    folder = parent / names.distribution
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another name, or another place with --out")
    template = template_folder()
    with atomic_folder(folder, seal=False) as aside:
        for source in sorted(template.rglob("*")):
            place = source.relative_to(template)
            if source.suffix in _SUFFIXES and not any(part.startswith((".", "__pycache__")) for part in place.parts):
                target = aside / _renamed(str(place), names)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_renamed(source.read_text(encoding="utf-8"), names), encoding="utf-8")
    return names, folder


def _refuse_taken(names: PluginNames, plugins: Plugins, registry: Registry) -> None:
    found, known = plugins.find("objectives", names.objective), registry.known["objectives"].get(names.objective)
    if found or known:
        owner = found.owner if found else known.distribution if known else ""
        raise UserError(f"there is an objective '{names.objective}' already, that of {owner}; choose another name")
    installed = any(source.called(names.distribution) for source in plugins.sources.values())
    if installed or importlib.util.find_spec(names.package):
        raise UserError(f"{names.distribution} is installed already; choose another name, or uninstall it")


def _renamed(text: str, names: PluginNames) -> str:
    """The template's text, or path, with the plugin's names; in one pass, so that a new name is not replaced again."""
    new = {
        "foveate-align": names.distribution,
        "foveate_align": names.package,
        "AlignLoss": names.cls,
        "align": names.objective,
    }
    return re.sub(r"foveate[-_]align|AlignLoss|\balign\b", lambda found: new[found.group()], text)
