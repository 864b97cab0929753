"""Discovery: finds plugins by entry point, keeps broken ones from doing harm, and maps names to classes.

A broken plugin never stops a run that does not ask for it; asked for, it is an error with its traceback. Order is by
name, foveate's own plugins first, so that the same environment always gives the same names to the same plugins.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from foveate import hookspecs
from foveate.errors import FoveateError, PluginError

KINDS = ("encoders", "projectors", "llms", "objectives", "teachers", "datasets", "metrics", "commands")
HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "foveate_spec"))
BLOCK = "FOVEATE_BLOCK_PLUGINS"
"""Environment variable: entry points or distributions, with commas between them, that are not loaded."""


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from: its distribution with version, and its entry point `name = module`."""

    distribution: str
    version: str
    name: str
    module: str

    @property
    def owner(self) -> str:
        """How it is called: ``foveate-jarvis (jarvis)``."""
        return f"{self.distribution} ({self.name})"

    @property
    def own(self) -> bool:
        """Whether it comes with foveate."""
        return _normal(self.distribution) == "foveate"

    def called(self, name: str) -> bool:
        """Whether `name` is its owner, its distribution, or its entry point."""
        return _normal(name) in {_normal(self.owner), _normal(self.distribution), _normal(self.name)}


@dataclass(frozen=True)
class Registration:
    """A name, what stands behind it, and who registered it; `rivals` would have registered it too."""

    kind: str
    name: str
    target: type | Callable[..., Any] | str
    owner: str
    rivals: tuple[str, ...] = ()

    def load(self) -> Any:
        """The class or function; imports ``"module:Class"`` targets.

        Raises `PluginError` with the traceback when the import fails, and where others claim the name.
        """
        if self.rivals:
            owners = " and by ".join((self.owner, *self.rivals))
            raise PluginError(
                f"{self.kind[:-1]} '{self.name}' is registered by {owners}: which one is meant? Uninstall the others, "
                f"or name their distributions in the environment variable {BLOCK}."
            )
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.kind[:-1]} '{self.name}' of {self.owner} cannot be imported from {self.target}\n"
                + traceback.format_exc()
            ) from error


class _Hooks:
    """The hooks of a manager, as functions: each plugin is called by itself."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        manager = self._plugins.manager
        caller = getattr(manager.hook, name)

        def call(**arguments: Any) -> list[Any]:
            found: list[Any] = []
            for owner in dict.fromkeys(entry.plugin_name for entry in reversed(caller.get_hookimpls())):
                others = [other for key, other in manager.list_name_plugin() if key != owner]
                try:
                    found += manager.subset_hook_caller(name, remove_plugins=others)(**arguments)
                except FoveateError:
                    raise
                except Exception as error:
                    self._failed(owner, name, error)
            return found

        return call

    def _failed(self, owner: str, hook: str, error: Exception) -> None:
        """An observer that nobody asked for is put aside and told; one of the recipe's plugins stops the run."""
        message = f"{owner} failed in its hook {hook}: {error!r}"
        if owner in self._plugins.asked or owner.startswith("foveate ("):
            raise PluginError(message) from error
        self._plugins.broken[owner] = message
        self._plugins.manager.unregister(name=owner)
        warnings.warn(f"{message}. It is put aside: the recipe does not ask for it", stacklevel=3)


@dataclass
class Plugins:
    """Every plugin that was found: the pluggy manager, the names they registered, and those that are not available."""

    manager: pluggy.PluginManager
    names: dict[str, dict[str, Registration]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    sources: dict[str, Source] = field(default_factory=dict)
    """Owner → where it was found; of those that an entry point names, available or not."""
    broken: dict[str, str] = field(default_factory=dict)
    """Owner → why it is not available (a traceback, or a sentence)."""
    blocked: set[str] = field(default_factory=set)
    """Those of `broken` that are well, but kept out by the user."""
    asked: set[str] = field(default_factory=set)
    """Owners of what a recipe has named."""

    @property
    def hook(self) -> Any:
        """Calls a hook of every plugin: `plugins.hook.stage_finished(run=…, stage=…)`.

        Raises `PluginError` with the plugin's name for whatever one that the recipe asks for raises; another is put
        aside with a warning. `FoveateError` passes.
        """
        return _Hooks(self)

    def find(self, kind: str, name: str) -> Registration | None:
        """What is registered under `name`, or None."""
        return self.names[kind].get(name)

    def hooks_of(self, owner: str) -> list[str]:
        """The hooks that an available plugin implements."""
        callers = self.manager.get_hookcallers(self.manager.get_plugin(owner)) or []
        return sorted(caller.name for caller in callers)

    def add(self, plugin: Any, owner: str) -> None:
        """Register a plugin object: version check, hook verification, names; all of it or nothing of it.

        Raises `PluginError` with `owner` and what is wrong. Where another plugin has one of its names, that plugin
        keeps the rest of what it has, and the name itself is an error when asked for; foveate's own stay foveate's.
        """
        _check_version(plugin, owner)
        if self.manager.has_plugin(owner) or self.manager.is_registered(plugin):
            raise PluginError(f"{owner} is the same plugin as {self.manager.get_name(plugin) or owner}")
        try:
            self.manager.register(plugin, name=owner)
            self._check_hooks(plugin, owner)
            found = [entry for kind in KINDS for entry in _registrations(self.manager, plugin, kind, owner)]
            self._check_names(found)
        except BaseException as error:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(f"{owner}: {' '.join(str(error).split())}") from error
            raise
        for entry in found:
            self.names[entry.kind][entry.name] = entry

    def _check_hooks(self, plugin: Any, owner: str) -> None:
        """Refuses a misspelt hook, one that is not marked as one, and a plugin without any."""
        callers = self.manager.get_hookcallers(plugin) or []
        for caller in callers:
            optional = all(entry.optionalhook for entry in caller.get_hookimpls() if entry.plugin is plugin)
            if caller.spec is None and not optional:
                from foveate.explain import did_you_mean  # pydantic, which nobody needs where all is well

                meant = did_you_mean(caller.name, HOOKS)
                raise PluginError(f"{owner} implements the unknown hook '{caller.name}'{meant}")
        unmarked = [name for name in HOOKS if _unmarked(getattr(plugin, name, None))]
        if unmarked:
            raise PluginError(f"{owner}: {unmarked[0]} is not marked as a hook; put @foveate.hookimpl above it")
        if not callers:
            raise PluginError(f"{owner} implements no hook; those are {', '.join(HOOKS)}")

    def _check_names(self, found: list[Registration]) -> None:
        """Refuses names that another plugin has."""
        taken = [(self.names[entry.kind].get(entry.name), entry) for entry in found]
        clashes = [(first, entry) for first, entry in taken if first is not None]
        for first, entry in clashes:
            if first.owner.partition(" ")[0] != "foveate":
                self.names[entry.kind][entry.name] = replace(first, rivals=(*first.rivals, entry.owner))
        if clashes:
            raise PluginError(
                "; ".join(
                    f"{entry.kind[:-1]} '{entry.name}' is registered twice: by {first.owner} and by {entry.owner}"
                    for first, entry in clashes
                )
            )


def _check_version(plugin: Any, owner: str) -> None:
    api = getattr(plugin, "HOOK_API", None)
    if api is None:
        raise PluginError(f"{owner} does not declare HOOK_API; write HOOK_API = {hookspecs.HOOK_API} beside its hooks")
    if api != hookspecs.HOOK_API:
        advice = "install a release of it for this foveate, or another foveate"
        raise PluginError(f"{owner} declares HOOK_API = {api!r}; this foveate speaks {hookspecs.HOOK_API}: {advice}")


def _unmarked(value: Any) -> bool:
    return inspect.isroutine(value) and not hasattr(value, "foveate_impl") and not hasattr(value, "foveate_spec")


def _registrations(manager: pluggy.PluginManager, plugin: Any, kind: str, owner: str) -> list[Registration]:
    """What one plugin registers in its hook `register_<kind>`."""
    found: dict[str, Registration] = {}

    def register(name: str, target: type | Callable[..., Any] | str) -> None:
        if not isinstance(name, str) or not name:
            raise PluginError(f"{owner} registers {name!r} among the {kind}; a name is text")
        if name in found:
            raise PluginError(f"{owner} registers {kind[:-1]} '{name}' twice")
        if not callable(target) and not (isinstance(target, str) and re.fullmatch(r"[\w.]+:[\w.]+", target)):
            raise PluginError(f"{owner} registers {kind[:-1]} '{name}' as {target!r}; give a class or 'module:Class'")
        found[name] = Registration(kind, name, target, owner)

    others = [other for other in manager.get_plugins() if other is not plugin]
    manager.subset_hook_caller(f"register_{kind}", remove_plugins=others)(register=register)
    return list(found.values())


def blocked_names() -> list[str]:
    """What the environment variable `FOVEATE_BLOCK_PLUGINS` names."""
    return [name.strip() for name in os.environ.get(BLOCK, "").split(",") if name.strip()]


def load_plugins(points: list[EntryPoint] | None = None) -> Plugins:
    """All plugins of the entry-point group ``foveate`` (or of `points`); `broken` are those that are not available."""
    manager = pluggy.PluginManager("foveate")
    manager.add_hookspecs(hookspecs)
    plugins, blocked = Plugins(manager), blocked_names()
    found = [(_source(point), point) for point in (entry_points(group="foveate") if points is None else points)]
    for source, point in sorted(found, key=lambda pair: _order(pair[0])):
        plugins.sources[source.owner] = source
        if any(source.called(name) for name in blocked):
            plugins.broken[source.owner] = f"the environment variable {BLOCK} blocks it"
            plugins.blocked.add(source.owner)
            continue
        try:
            plugins.add(point.load(), source.owner)
        except PluginError as error:
            plugins.broken[source.owner] = re.sub(rf"^{re.escape(source.owner)}:? ", "", str(error))
        except (Exception, SystemExit):
            plugins.broken[source.owner] = traceback.format_exc()
    return plugins


def _source(point: EntryPoint) -> Source:
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
    return Source(distribution or "unknown", version or "", point.name, point.value)


def _order(source: Source) -> tuple[bool, bool, str, str]:
    return not source.own, source.name != "core", _normal(source.distribution), source.name


def _normal(name: str) -> str:
    """A distribution's name as PyPI compares them: `Foveate_X` is `foveate-x`."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def installed_plugins() -> Plugins:
    """The plugins of this environment, discovered once a process."""
    return load_plugins()
