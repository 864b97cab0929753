"""`foveate plugins`, `foveate plugins show NAME` and `foveate new-plugin NAME`.

The list imports no torch; `show` imports the one class that it describes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.errors import FoveateError, PluginError, UserError
from foveate.plugins import KINDS, Plugins, Registration, blocked_names, installed_plugins

app = typer.Typer(help="What is installed: plugins, what they register, and how it is used.")
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]

_PASTE = {
    "encoders": ("model:\n  encoder:", "    "),
    "projectors": ("model:\n  projector:", "    "),
    "llms": ("model:\n  llm:", "    "),
    "teachers": ("# among the options of an objective:\nteacher:", "  "),
    "datasets": ("# in a stage:\ndata:", "  - "),
    "metrics": ("evaluate:\n  metrics:", "    - "),
}
"""Where a part stands in a recipe, and how its keys are set off."""


@app.callback(invoke_without_command=True)
def plugins(context: typer.Context, as_json: Json = False) -> None:
    """List plugins, broken ones too, and objectives that are known but not installed."""
    if context.invoked_subcommand is not None:
        return
    from foveate.registry import load_registry

    found, registry = installed_plugins(), load_registry()[0]
    listed = [_told(found, owner) for owner in _owners(found)]
    known = [
        {"name": name, "kind": kind, **vars(plugin)}
        for kind, entries in registry.known.items()
        for name, plugin in entries.items()
        if found.find(kind, name) is None
    ]
    idle = [name for name in blocked_names() if not any(source.called(name) for source in found.sources.values())]
    if as_json:
        typer.echo(json.dumps({"plugins": listed, "known": known, "blocked_but_absent": idle}, indent=2))
        return
    notes = [f"FOVEATE_BLOCK_PLUGINS names {name!r}, which is not installed" for name in idle]
    _show_plugins(listed, [*notes, "foveate plugins show NAME tells the options of a name, and why a plugin is broken"])
    if known:
        from foveate.progress import Display

        rows = [(entry["name"], entry["kind"][:-1], entry["install"], entry["summary"]) for entry in known]
        Display().table("Known, not installed", ("name", "kind", "install", "what it does"), rows)


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What a recipe would say, such as an objective; or a plugin.")],
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=f"One of: {', '.join(KINDS)}.")] = None,
    as_json: Json = False,
) -> None:
    """Describe what is registered under a name: its options, what it reads, and the lines for a recipe."""
    found, as_json = installed_plugins(), as_json or bool(context.parent and context.parent.params["as_json"])
    if kind is not None and kind not in KINDS:
        from foveate.explain import did_you_mean

        raise UserError(f"--kind {kind}: there is no such kind{did_you_mean(kind, KINDS)}")
    entry = _lookup(found, name, kind)
    if entry is None:
        owners = [owner for owner in _owners(found) if owner in found.sources and found.sources[owner].called(name)]
        if kind is not None or not owners:
            raise PluginError(_unknown(found, name, [kind] if kind else KINDS))
        if broken := [f"{owner} is not available: {found.broken[owner]}" for owner in owners if owner in found.broken]:
            raise PluginError("\n".join(broken))
        listed = [_told(found, owner) for owner in owners]
        if as_json:
            typer.echo(json.dumps({"plugins": listed}, indent=2))
        else:
            _show_plugins(listed)
        return
    told = describe(found, entry)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.secho(f"{entry.kind[:-1]} {entry.name}", bold=True, nl=False)
    typer.echo(f", from {told['owner']} {told['version']}\n{told['summary']}")
    for label, value in told["facts"].items():
        typer.echo(f"- {label}: {value}")
    if told["options"]:
        from foveate.progress import Display

        rows = [tuple(row.values()) for row in told["options"]]
        Display().table("\nOptions", ("key", "type", "default", "meaning"), rows)
    typer.echo(f"\n{told['use']}")


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the objective, such as edge-map.")],
    out: Annotated[Path, typer.Option(help="Folder to make it in.")] = Path("."),
) -> None:
    """Write a new objective as a distribution of its own, with tests; it installs and trains at once."""
    from foveate.registry import load_registry
    from foveate.scaffold import write_plugin

    names, folder = write_plugin(name, out, installed_plugins(), load_registry()[0])
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    typer.echo(f"wrote {folder}: {', '.join(files)}\n\nnext:")
    for command in (f"pip install -e {folder}", f"pytest {folder}", f"foveate plugins show {names.objective}"):
        typer.echo(f"  {command}")
    typer.echo(f"\nin a recipe:\n{recipe_lines('objectives', names.objective, [])}")


def _owners(found: Plugins) -> list[str]:
    """Every plugin, available or not, in the order in which they were found."""
    return list(dict.fromkeys([*found.sources, *(name for name, _ in found.manager.list_name_plugin()), *found.broken]))


def _told(found: Plugins, owner: str) -> dict[str, Any]:
    """One plugin: where it comes from, its state, and what it registers by kind."""
    source, reason = found.sources.get(owner), found.broken.get(owner)
    state = "blocked" if owner in found.blocked else "broken" if reason is not None else "ok"
    entries = [entry for names in found.names.values() for entry in names.values() if entry.owner == owner]
    return {
        "owner": owner,
        "distribution": source.distribution if source else owner.partition(" ")[0],
        "version": source.version if source else "",
        "module": source.module if source else "",
        "state": state,
        "reason": reason,
        "registers": {kind: names for kind in KINDS if (names := [e.name for e in entries if e.kind == kind])},
        "hooks": [hook for hook in found.hooks_of(owner) if not hook.startswith("register_")] if not reason else [],
    }


def _show_plugins(listed: Iterable[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    from foveate.progress import Display

    rows: list[tuple[str, ...]] = []
    for plugin in listed:
        registers = {**plugin["registers"], **({"hooks": plugin["hooks"]} if plugin["hooks"] else {})}
        what = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in registers.items())
        reason = (plugin["reason"] or "").strip().splitlines()[-1:]
        rows.append((plugin["owner"], plugin["version"], what, ": ".join([plugin["state"], *reason])))
    Display().table("Plugins", ("plugin", "version", "registers", "state"), rows, notes)


def _lookup(found: Plugins, name: str, kind: str | None) -> Registration | None:
    """What is registered under `name`, objectives before all else. Raises `UserError` where several kinds have it."""
    kinds = [one for one in ([kind] if kind else KINDS) if found.find(one, name)]
    if len(kinds) > 1 and "objectives" not in kinds:
        raise UserError(f"'{name}' is the name of several things; say which: --kind {' or --kind '.join(kinds)}")
    return found.find("objectives" if "objectives" in kinds else kinds[0], name) if kinds else None


def _unknown(found: Plugins, name: str, kinds: Iterable[str]) -> str:
    """What to do about a name that nothing is registered under: another spelling, an installation, a repair."""
    from foveate.explain import closest, did_you_mean
    from foveate.registry import load_registry

    registry = load_registry()[0]
    for kind in kinds:
        if preset := registry.presets[kind].get(name):
            of = preset.options["type"]
            return f"'{name}' is a preset of the {kind}, of type '{of}': foveate plugins show {of} --kind {kind}"
    known = {key: plugin for kind in kinds for key, plugin in registry.known[kind].items()}
    names = {*known, *(key for kind in kinds for key in found.names[kind])}
    meant = name if name in known else closest(name, names)
    told = f"nothing is registered as '{name}'" + ("" if meant == name else did_you_mean(name, names))
    if meant in known and not any(found.find(kind, meant) for kind in kinds):
        plugin = known[meant]
        told += f". '{meant}' ({plugin.summary}) comes with {plugin.distribution}: {plugin.install}"
    for owner, reason in found.broken.items():
        told += f". The plugin {owner} is not available and may be what is missing: {reason.strip().splitlines()[-1]}"
    return told.replace("?.", "?")


def describe(found: Plugins, entry: Registration) -> dict[str, Any]:
    """Everything about a registered name. Raises `PluginError` where its class cannot be imported."""
    target, source = entry.load(), found.sources.get(entry.owner)
    model = getattr(target, "Options", None)
    options, required = _options(model) if model is not None else ([], [])
    use = f"foveate {entry.name} --help" if entry.kind == "commands" else recipe_lines(entry.kind, entry.name, required)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "owner": entry.owner,
        "version": source.version if source else "",
        "summary": inspect.cleandoc(target.__doc__ or "It has no description."),
        "facts": {
            "code": f"{target.__module__}.{target.__qualname__}",
            **(_facts(found, entry, target) if entry.kind == "objectives" else {}),
        },
        "options": options,
        "use": use,
    }


def _options(model: Any) -> tuple[list[dict[str, str]], list[tuple[str, str, str]]]:
    """Rows of a table, nested options with their path, what all objectives have last; and those that are required."""
    from foveate.objective import ObjectiveOptions
    from foveate.recipe_docs import _sections, _type

    rows, required = [], []
    for path, section in _sections(model, ""):
        common = ObjectiveOptions.model_fields if issubclass(section, ObjectiveOptions) else {}
        for key, field in sorted(section.model_fields.items(), key=lambda entry: entry[0] in common):
            where = f"{path}.{field.alias or key}".lstrip(".")
            kind, meaning = _type(field.annotation, field.metadata), " ".join((field.description or "").split())
            if field.is_required() and not path:
                required.append((where, kind, meaning))
            rows.append({"key": where, "type": kind.replace("`", ""), "default": _default(field), "meaning": meaning})
    return rows, required


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if field.default_factory is not None or hasattr(value, "model_fields"):
        return "computed" if field.default_factory is not None else "see below"
    return json.dumps(value.resolved() if hasattr(value, "resolved") else value, default=str, ensure_ascii=False)


def _facts(found: Plugins, entry: Registration, cls: Any) -> dict[str, str]:
    """What an objective is, as far as its class and default options tell."""
    from foveate.objective import VisionObjective
    from foveate.registry import load_registry

    def changes(method: str) -> bool:
        return inspect.getattr_static(cls, method, None) is not inspect.getattr_static(VisionObjective, method)

    if not (isinstance(cls, type) and issubclass(cls, VisionObjective)):
        raise PluginError(f"objective '{entry.name}' of {entry.owner}: {cls!r} is no subclass of VisionObjective")
    registry = load_registry()[0]
    known = registry.known["objectives"].get(entry.name)
    facts = {"paper": f"arXiv {known.paper}"} if known and known.paper else {}
    seen = {"input": "those that the model sees", "target": "`target` images, which the model does not see"}
    facts["images"] = seen[cls.role]
    facts["reads"] = _reads(found, entry, cls)
    if "teacher" in cls.Options.model_fields:
        names = ", ".join([*found.names["teachers"], *registry.presets["teachers"]])
        facts["teacher"] = f"the one that the option `teacher` names, of {names or 'none that is installed'}"
    elif changes("build_teacher"):
        facts["teacher"] = "its own"
    habits = {
        "edits the visual tokens": changes("edit_visual_tokens"),
        "adds tokens after an image": changes("extra_tokens"),
        "changes who attends to whom": changes("attention"),
        "fits its teacher to your pictures": changes("fit_teacher"),
        "compares the images of a batch, so that packing matters": cls.batch_dependent,
    }
    told = [habit for habit, true in habits.items() if true]
    return {**facts, **({"also": "; ".join(told)} if told else {})}


def _reads(found: Plugins, entry: Registration, cls: Any) -> str:
    """What it reads with its default options."""
    from pydantic import ValidationError

    from foveate.data.views import ObjectiveRule

    try:
        reads = ObjectiveRule(entry.name, cls, cls.Options.model_validate({}, context={"plugins": found})).reads
    except ValidationError:
        return "depends on its required options"
    except FoveateError as error:
        return str(error)
    layers = {"LLM": reads.llm, "encoder": reads.encoder, "encoder, for its teacher,": reads.teacher}
    told = [f"{stack} at layer {', '.join(map(str, which))}" for stack, which in layers.items() if which]
    return ("; ".join(told) or "nothing") + ("; states of the token before each visual token" if reads.shift else "")


def recipe_lines(kind: str, name: str, required: Iterable[tuple[str, str, str]]) -> str:
    """YAML to paste into a recipe; `required`: options that have no default, as key, type in words, and meaning."""
    options = [f"{key}: {_example(words)}  # {meaning}" for key, words, meaning in required]
    if kind == "objectives":
        keys = "".join(f"\n    {option}" for option in ["weight: 1.0", *options])
        trained = f"# in a stage, beside the other parts that it trains:\ntrain:\n  {name}: 1.0e-3"
        return f"objectives:\n  {name}:{keys}\n{trained}"
    head, first = _PASTE[kind]
    keys = f"\n{' ' * len(first)}".join([f"type: {name}", *options])
    return f"{head}\n{first}{keys}"


def _example(words: str) -> str:
    """A value of a type that is given in words: the first of a choice, else the words, to be replaced."""
    choice = re.match("`([^`]*)`", words)
    return json.dumps(choice[1] if choice else f"<{words}>", ensure_ascii=False)
