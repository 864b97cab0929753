"""The catalogue `registry.yaml`, and the way from a recipe's name or mapping to a class with its options."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from foveate.errors import PluginError
from foveate.explain import closest, did_you_mean, explain, said, said_at
from foveate.options import Options
from foveate.plugins import KINDS, Plugins, installed_plugins
from foveate.yaml_tree import Block, Problem, merge, plain, read_yaml, shown

SECTIONS = KINDS


@dataclass(frozen=True)
class Component:
    """A part that a recipe names: the name its class is registered under, the class, and its checked options."""

    type: str
    cls: Any
    options: Options
    preset: str | None = None

    def resolved(self) -> dict[str, Any]:
        """Plain values that give the same component again, whatever the catalogue says then."""
        return {"type": self.type, **self.options.model_dump(mode="json", by_alias=True)}


class Preset(NamedTuple):
    """Named options of the catalogue, and the file they stand in."""

    options: Block
    file: Path


@dataclass(frozen=True)
class KnownPlugin:
    """Where to get what is registered under a name, whether or not it is installed."""

    distribution: str
    summary: str
    install: str
    paper: str | None = None


@dataclass
class Registry:
    """Presets and known plugins, by kind (`encoders`, …) and name."""

    presets: dict[str, dict[str, Preset]] = field(default_factory=lambda: {kind: {} for kind in SECTIONS})
    known: dict[str, dict[str, KnownPlugin]] = field(default_factory=lambda: {kind: {} for kind in SECTIONS})
    texts: set[bytes] = field(default_factory=set)

    def add_file(self, path: Path) -> list[Problem]:
        """Add a catalogue; returns what is wrong with it, names that an earlier file has included."""
        if (text := path.read_bytes()) in self.texts:  # the packaged one, seen from its own folder
            return []
        self.texts.add(text)
        tree = read_yaml(path)

        def wrong(message: str, *loc: str) -> None:
            tree.problems.append(Problem(tree.place(loc), loc, message))

        for kind, entries in tree.root.items() if isinstance(tree.root, Block) else []:
            if kind not in SECTIONS or not isinstance(entries, Block):
                wrong(f"must be a mapping of names, and one of: {', '.join(SECTIONS)}", kind)
                continue
            for name, entry in entries.items():
                keys = entry.keys() if isinstance(entry, Block) else set()
                if name in self.presets[kind]:
                    wrong(f"'{name}' is in {shown(self.presets[kind][name].file)} too; rename it", kind, name)
                elif "type" in keys:
                    self.presets[kind][name] = Preset(entry, path)
                elif {"distribution", "summary", "install"} <= keys <= KnownPlugin.__annotations__.keys():
                    self.known[kind][name] = KnownPlugin(**entry)
                else:
                    wrong("must be a preset (`type` and options) or a known plugin (`distribution` …)", kind, name)
        return tree.problems


def packaged_registry() -> Path:
    """The catalogue that comes with foveate: in the installed package, or beside `core/` in a checkout."""
    package = Path(__file__).resolve().parent
    return next(path for path in (package / "registry.yaml", package.parents[1] / "registry.yaml") if path.is_file())


def load_registry(folders: Iterable[Path] = ()) -> tuple[Registry, list[Problem]]:
    """The packaged catalogue and the `registry.yaml` of each of `folders`, and what is wrong with them."""
    registry = Registry()
    paths = [packaged_registry(), *(folder / "registry.yaml" for folder in folders)]
    return registry, [problem for path in paths if path.is_file() for problem in registry.add_file(path)]


def resolve(
    kind: str, value: Any, context: Mapping[str, Any] | None, default: str | None = None, also: Collection[str] = ()
) -> Component:
    """The component of `kind` (`encoders`, …) that `value`, a name or a mapping, asks for.

    A name is a preset or a registered type; a mapping has `preset`, or `type` (else `default`), and options. `context`
    may bring `plugins`, `registry` and `folder`; `also` are keys that the caller keeps for itself. Raises what a
    validator may raise.
    """
    if isinstance(value, Component):
        return value
    context = context or {}
    plugins: Plugins = context.get("plugins") or installed_plugins()
    registry: Registry = context.get("registry") or load_registry()[0]
    presets, registered = registry.presets[kind], plugins.names.get(kind, {})
    if isinstance(value, str):
        value = Block({"preset" if value in presets else "type": value})
    elif not isinstance(value, dict):
        raise said(f"must be a name or a mapping of options: which {kind[:-1]}?")
    given = value if isinstance(value, Block) else Block(value)
    name, preset, options = given.get("type", default), given.get("preset"), given.without("preset", "type")
    base = presets.get(str(preset))
    if base is not None:
        name, options = base.options["type"], merge(base.options.without("type"), options)
    if preset is not None and (base is None or given.get("type", name) != name):
        mismatch = f"preset '{preset}' is of type '{name}'; leave `type` out"
        mismatch = mismatch if base else f"unknown preset {str(preset)!r}"
        raise said_at(mismatch + ("" if base else did_you_mean(str(preset), presets)), "preset")
    if name is None:
        raise said_at(f"say which {kind[:-1]}: {', '.join(sorted(registered)) or 'none is installed'}", "type")
    if (name := str(name)) not in registered:
        raise said_at(_unknown(kind, name, plugins, registry), "type")
    plugins.asked.add(registered[name].owner)
    try:
        cls = registered[name].load()
    except PluginError as error:
        raise said_at(str(error), "type") from None
    model: type[Options] = getattr(cls, "Options", Options)
    try:
        checked = model.model_validate(plain(options), context={**context, "folders": options.folders})
    except ValidationError as error:
        told = explain(error, model, {"type", "preset", *also})
        for line in told.errors() if base is not None else ():
            if line["loc"] and line["loc"][0] not in given:
                raise said(f"preset '{preset}': {'.'.join(map(str, line['loc']))}: {line['msg']}") from None
        raise told from None
    return Component(name, cls, checked, preset)


def _unknown(kind: str, name: str, plugins: Plugins, registry: Registry) -> str:
    """What to do about a name that nothing is registered under: another spelling, an installation, a repair."""
    registered, known = plugins.names.get(kind, {}), registry.known[kind]
    names = {*registered, *registry.presets[kind], *known}
    meant = name if name in known else closest(name, names)
    sentences = [f"unknown {kind[:-1]} {name!r}" + ("." if meant == name else did_you_mean(name, names))]
    plugin = known.get(meant or "") if meant not in registered else None
    if plugin is not None:
        paper = f", arXiv {plugin.paper}" if plugin.paper else ""
        sentences.append(f"'{meant}' ({plugin.summary}{paper}) comes with {plugin.distribution}: {plugin.install}")
    others = 0
    for owner, reason in plugins.broken.items():
        mine = plugin is not None and owner.startswith(f"{plugin.distribution} ")
        if mine or name.casefold() in owner.casefold():
            sentences.append(f"The plugin {owner} is not available: {reason.strip()}")
        else:
            others += 1
    if others:
        sentences.append(f"`foveate plugins` tells of {others} installed that cannot be used, such as {owner}")
    return re.sub(r"(?<=[?.])\. ", " ", ". ".join(sentences))
