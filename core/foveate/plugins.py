"""Discovery: finds plugins by entry point, keeps broken ones from doing harm, and maps names to classes.

A broken plugin never stops a run that does not ask for it; asked for, it is an error with its traceback.
"""

from __future__ import annotations

import functools
import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from foveate import hookspecs
from foveate.errors import PluginError

KINDS = ("encoders", "projectors", "llms", "objectives", "teachers", "datasets", "metrics", "commands")


@dataclass(frozen=True)
class Registration:
    """A name, what stands behind it, and who registered it."""

    kind: str
    name: str
    target: type | Callable[..., Any] | str
    owner: str

    def load(self) -> Any:
        """The class or function; imports ``"module:Class"`` targets.

        Raises `PluginError` with the traceback when the import fails.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise PluginError(
                f"{self.kind[:-1]} '{self.name}' of {self.owner} cannot be imported from {self.target}\n"
                + traceback.format_exc()
            ) from error


@dataclass
class Plugins:
    """Every plugin that was found: the pluggy manager, the names they registered, and those that are broken."""

    manager: pluggy.PluginManager
    names: dict[str, dict[str, Registration]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    broken: dict[str, str] = field(default_factory=dict)
    """Owner → why it is not available (a traceback, or a sentence)."""

    @property
    def hook(self) -> Any:
        """Calls a hook of every plugin: `plugins.hook.stage_finished(run=…, stage=…)`."""
        return self.manager.hook

    def find(self, kind: str, name: str) -> Registration | None:
        """What is registered under `name`, or None."""
        return self.names[kind].get(name)

    def add(self, plugin: Any, owner: str) -> None:
        """Register a plugin object: version check, hook verification, names; all of it or nothing of it.

        Raises `PluginError` that names `owner` and what is wrong.
        """
        api = getattr(plugin, "HOOK_API", None)
        if api != hookspecs.HOOK_API:
            raise PluginError(f"{owner} declares HOOK_API = {api!r}; this foveate speaks {hookspecs.HOOK_API}")
        self.manager.register(plugin, name=owner)
        try:
            for implementation in self.manager.get_hookcallers(plugin) or []:
                if implementation.spec is None:
                    raise PluginError(f"{owner} implements the unknown hook '{implementation.name}'")
            found = [entry for kind in KINDS for entry in _registrations(self.manager, plugin, kind, owner)]
            for entry in found:
                taken = self.names[entry.kind].get(entry.name)
                if taken is not None:
                    raise PluginError(
                        f"{entry.kind[:-1]} '{entry.name}' is registered twice: by {taken.owner} and by {owner}"
                    )
        except BaseException:
            self.manager.unregister(plugin)
            raise
        for entry in found:
            self.names[entry.kind][entry.name] = entry


def _registrations(manager: pluggy.PluginManager, plugin: Any, kind: str, owner: str) -> list[Registration]:
    """What one plugin registers in its hook `register_<kind>`."""
    found: dict[str, Registration] = {}

    def register(name: str, target: type | Callable[..., Any] | str) -> None:
        if name in found:
            raise PluginError(f"{owner} registers {kind[:-1]} '{name}' twice")
        found[name] = Registration(kind, name, target, owner)

    others = [other for other in manager.get_plugins() if other is not plugin]
    manager.subset_hook_caller(f"register_{kind}", remove_plugins=others)(register=register)
    return list(found.values())


def load_plugins(points: list[EntryPoint] | None = None) -> Plugins:
    """All plugins of the entry-point group ``foveate`` (or of `points`), broken ones set aside with their reason."""
    manager = pluggy.PluginManager("foveate")
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager)
    for point in list(entry_points(group="foveate")) if points is None else points:
        owner = f"{point.dist.name if point.dist else 'unknown'} ({point.name})"
        try:
            plugins.add(point.load(), owner)
        except PluginError as error:
            plugins.broken[owner] = str(error)
        except Exception:
            plugins.broken[owner] = traceback.format_exc()
    return plugins


@functools.cache
def installed_plugins() -> Plugins:
    """The plugins of this environment, discovered once a process."""
    return load_plugins()
