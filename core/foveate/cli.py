"""The command `foveate`. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import glob
import io
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from foveate import __version__, export_cli, plugin_cli, show_cli
from foveate.errors import FoveateError
from foveate.plugins import Registration, installed_plugins


class PluginGroup(TyperGroup):
    """Core's commands, and those that plugins register: `register("data digits", …)` stands in the group `data`.

    A plugin's command is imported when it runs or when its own group is described, never for `foveate --help`.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        path = _path(ctx)
        names = [name.split() for name in installed_plugins().names["commands"]]
        below = [words[len(path)] for words in names if len(words) > len(path) and words[: len(path)] == path]
        return list(dict.fromkeys([*super().list_commands(ctx), *below]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in self.list_commands(ctx):
            return own
        words = [*_path(ctx), cmd_name]
        found = installed_plugins().find("commands", " ".join(words))
        if found is None:
            return PluginGroup(name=cmd_name, help="Commands of plugins.", no_args_is_help=True)
        described = ctx.meta.get("foveate.describing", False)
        if described and len(words) == 1:
            return TyperCommand(cmd_name, help=f"From {found.owner}.")
        try:
            return _plugin_command(found, cmd_name)
        except FoveateError as error:
            if not described:
                raise
            return TyperCommand(cmd_name, help=f"Broken: {str(error).splitlines()[0]}")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        ctx.meta["foveate.describing"] = True
        super().format_help(ctx, formatter)


def _path(ctx: Any) -> list[str]:
    """The words of a group after `foveate`."""
    return [*_path(ctx.parent), ctx.info_name] if ctx.parent else []


def _plugin_command(found: Registration, name: str) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name)(found.load())
    return typer.main.get_command(single)


app = typer.Typer(
    cls=PluginGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Train large multimodal models that are supervised on what they see, not only on what they say.",
    epilog="Every command takes --debug: the traceback of an error, instead of one paragraph about it.",
)
data_app = typer.Typer(cls=PluginGroup, no_args_is_help=True, help="Look at data before training on them.")
app.add_typer(data_app, name="data")

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, such as stages.0.batch_size=8. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def _foveate(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run stopped; begin where it has not begun.")
    ] = False,
) -> None:
    """Train what a recipe says, stage by stage."""
    from foveate.processes import together
    from foveate.recipe_file import load_recipe

    with together():
        loaded = load_recipe(recipe, overrides or ())
        from foveate.progress import Display
        from foveate.training import train as train_recipe

        run = train_recipe(loaded, resume=resume)
    if run.main:
        folder = _shown(run.folder)
        display = Display()
        display.say(f"run folder: {folder} (recipe.yaml, manifest.json, metrics.jsonl, the stages' checkpoints)")
        display.say(f"model: {folder / 'model'}; start another recipe from it with `model: {{from: {folder}}}`")
        if (folder / "report.html").is_file():
            display.say(f"report: {folder / 'report.html'}")
        for name in loaded.objectives:
            for picture in sorted((run.folder / "pictures").glob(f"{glob.escape(name)}-01-*.png")):
                display.say(f"what {name} has learned: {_shown(picture)}")
        other = f"output={folder}-2" if folder.name != loaded.name else f"name={loaded.name}-2"
        display.say(f"try next: foveate train {recipe} --set {other} --set seed={loaded.seed + 1}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Read no data: they need not be here.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would train: parts, parameters, learning rates, steps, tokens. Loads no weights."""
    from foveate.data.elsewhere import elsewhere
    from foveate.plugins import installed_plugins
    from foveate.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or (), plugins=elsewhere(installed_plugins()) if no_data else None)
    from foveate.data_room import DataRoom
    from foveate.model.build import blueprint
    from foveate.plan import make_plan, render
    from foveate.progress import Display

    made = make_plan(loaded, DataRoom(loaded, blueprint(loaded.model)), data=not no_data)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
    else:
        render(made, Display())


@data_app.command()
def check(
    source: Annotated[
        Path,
        typer.Argument(help="A recipe (all its data) or a LLaVA file, JSON or JSONL.", metavar="RECIPE|FILE"),
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of a FILE's pictures. Default: the FILE's own.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id: count the tokens of a FILE.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template of a FILE, beside --tokenizer.")] = None,
    visual_tokens: Annotated[int, typer.Option(min=1, help="Visual tokens of an image of a FILE.")] = 576,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest sample of a FILE, in tokens.")] = None,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 0,
    as_json: Json = False,
) -> None:
    """List every defect of a corpus in one pass: pictures, placeholders, answers, lengths. Exits 2 where there are."""
    from foveate.errors import UserError

    is_recipe = source.suffix in (".yaml", ".yml")
    for_files = {"images": images, "tokenizer": tokenizer, "template": template, "max-length": max_length}
    given = [f"--{name}" for name, value in for_files.items() if value is not None]
    if is_recipe and given:
        raise UserError(f"{', '.join(given)}: only for a LLaVA file; {source} is a recipe, which says these itself.")
    if not is_recipe and overrides:
        raise UserError(f"--set is for recipes, and {source} is not one (.yaml).")
    if max_length and not tokenizer:
        raise UserError("--max-length counts tokens: give --tokenizer too.")
    if is_recipe:
        corpora = _corpora_of_recipe(source, overrides or ())
    else:
        corpora = [(source.name, *_corpus_of_file(source, images, tokenizer, template, visual_tokens, max_length))]
    from foveate.data.check import check as read_all
    from foveate.progress import Display

    display, sound, told = Display(), True, {}
    unknown = () if is_recipe or tokenizer else ("tokens", "supervised")
    for name, sources, rules in corpora:
        with display.counting(f"checking {name}", sum(len(entry.dataset) for entry in sources)) as done:
            report = read_all(sources, rules, workers=workers, progress=done)
        statistics = {key: value for key, value in report.statistics.items() if key not in unknown}
        sound = sound and not report.defects
        defects = [vars(defect) for defect in report.defects]
        told[name] = {"samples": report.samples, "counts": report.counts, "statistics": statistics, "defects": defects}
        if not as_json:
            for entry in report.defects:
                typer.echo(str(entry))
            rows: list[tuple[Any, ...]] = [(key, *map(round, value.values())) for key, value in statistics.items()]
            found = ", ".join(f"{count} {kind}" for kind, count in report.counts.items()) or "none"
            columns = ("", "count", "min", "median", "p95", "max")
            display.table(f"{name}: {report.samples:,} samples, defects: {found}", columns, rows)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    raise typer.Exit(0 if sound else 2)


def _corpora_of_recipe(path: Path, overrides: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Everything that a recipe reads: name, sources, and the rules that they are read by."""
    from foveate.recipe_file import load_recipe

    recipe = load_recipe(path, overrides)
    from foveate.data_room import DataRoom
    from foveate.model.build import blueprint

    room = DataRoom(recipe, blueprint(recipe.model))
    corpora = []
    for stage in recipe.stages:
        corpora.append((stage.name, room.sources(stage.data), room.rules(stage)))
        if stage.validate_:
            corpora.append((f"{stage.name} (held out)", room.sources(stage.validate_.data), room.rules(stage)))
    if recipe.evaluate:
        rules = room.rules(recipe.stages[-1], recipe.evaluate.template)
        corpora.append(("evaluate", room.sources(recipe.evaluate.data), rules))
    return corpora


def _corpus_of_file(
    path: Path,
    images: Path | None,
    tokenizer: str | None,
    template: str | None,
    visual_tokens: int,
    max_length: int | None,
) -> tuple[Any, Any]:
    """A LLaVA file by itself; without a tokenizer every byte is a token, and lengths mean nothing."""
    from foveate.data.llava import LlavaDataset
    from foveate.data.mixture import Source
    from foveate.data.sample import SampleRules
    from foveate.data.templates import load_template
    from foveate.data.tokenizer import load_tokenizer, train_tokenizer
    from foveate.errors import DataError
    from foveate.types import EncoderSpec

    for place in (path, images):
        if place is not None and not place.exists():
            raise DataError(f"no such file or folder: {place}")
    dataset = LlavaDataset(LlavaDataset.Options.model_validate({"path": path.resolve(), "images": images}))
    loaded = load_tokenizer(tokenizer).tokenizer if tokenizer else train_tokenizer([], 512)
    spec = EncoderSpec(336, (1, visual_tokens), 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rules = SampleRules(
        loaded, load_template(template or "chat", loaded), spec, spec.grid, max_length=max_length or sys.maxsize
    )
    return [Source(dataset, name=path.name)], rules


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


app.add_typer(plugin_cli.app, name="plugins", cls=PluginGroup)
app.command("new-plugin")(plugin_cli.new_plugin)
app.command(cls=show_cli.ManyImages)(show_cli.show)
app.command()(export_cli.export)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0, 2 for the user's mistakes, 1 for failures, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    command: Callable[..., Any] = typer.main.get_command(app)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        command(args=[word for word in words if word != "--debug"], prog_name="foveate")
    except FoveateError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C", 130, debug)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer's word for Ctrl-C
            _fail("stopped by Ctrl-C", 130, debug)
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"
        advice = "This was not foreseen: run again with --debug for the traceback; report it if foveate is to blame."
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without torch
            advice = "Lower hardware.tokens_per_microbatch or set hardware.gradient_checkpointing; no gradient changes."
        _fail(f"{text}. {advice}", 1, debug)


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if status != 130:
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
