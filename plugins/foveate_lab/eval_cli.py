"""`foveate eval RUN|EXPORT`: a model answers questions, greedily; how often it is right, by type of question."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foveate import __version__
from foveate.errors import DataError, RunError, UserError

if TYPE_CHECKING:

    from foveate import ConversationDataset
    from foveate_lab.queries import Rows


def eval_model(
    model: Annotated[
        Path,
        typer.Argument(
            help="A finished run, or what `foveate export` wrote.", metavar="RUN|EXPORT", show_default=False
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATA",
            show_default="what the run's recipe evaluates",
            help="A LLaVA file, JSON or JSONL; or a data set as a recipe names it: '{type: digits, task: questions}'.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of a FILE's pictures.", show_default="the FILE's own")
    ] = None,
    metric: Annotated[
        Literal["auto", "exact", "yesno", "letter"],
        typer.Option(help="How an answer is compared; `auto`: by the form of its reference."),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ask only the first N questions.")] = None,
    precision: Annotated[Literal["fp32", "bf16", "fp64"], typer.Option(help="Of weights and arithmetic.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the accelerator, where there is one")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write table and answers to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write them to stdout, for programs.")] = False,
) -> None:
    """Ask a trained model questions, and count how often it is right."""
    is_run, is_file = _is_run(model), data is not None and _names_file(data)
    if images is not None and not is_file:
        raise UserError("--images is the folder of a file's pictures: give --data FILE too.")
    if data is None and not is_run:
        raise UserError(f"{model} is an export, which has no data of its own: give --data.")
    if out is not None:
        _check_out(out)
    from foveate import load_run
    from foveate.files import write_json
    from foveate.precision import DTYPES, find_device
    from foveate.progress import Display
    from foveate_lab.evaluation import evaluate, metrics_of
    from foveate_lab.generation import Answerer, ExportAnswerer, RunAnswerer
    from foveate_lab.queries import Joined, check_pictures, pictures_of, read_queries

    place, display = find_device(device), Display()
    # weights are cast before they go to the accelerator: half of the memory there
    loaded, template = load_run(model, device="cpu") if is_run else None, None
    rows: Rows
    if data is not None:
        rows = open_data(data, images)
    else:
        assert loaded is not None
        wish = loaded.recipe.evaluate
        if wish is None:
            raise UserError(f"{model}: its recipe has no `evaluate`, or its data are not here any more: give --data.")
        rows, template = Joined(loaded.data.sources(wish.data)), wish.template
    queries = read_queries(rows, limit)
    metrics_of(queries, metric)
    if pictures := pictures_of(queries):
        with display.counting("opening pictures", len(pictures)) as done:
            check_pictures(pictures, done)
    answerer: Answerer
    if loaded is not None:
        answerer = RunAnswerer(loaded, template, DTYPES[precision], place)
    else:
        answerer = ExportAnswerer(model.resolve(), DTYPES[precision], place)
    if misread := sum(answerer.misreads(query) for query in queries):
        many = "1 question holds" if misread == 1 else f"{misread} questions hold"
        display.say(f"{many} control tokens as text: transformers reads them as such, training read them as text")
    told = {
        "foveate": __version__, "model": str(model.resolve()), "kind": answerer.kind, "data": data, "metric": metric,
        "precision": precision, "device": str(place), "batch_size": batch_size, "max_new_tokens": max_new_tokens,
        **evaluate(answerer, queries, metric, batch_size, max_new_tokens, display.counting),
    }  # fmt: skip
    if out is not None:
        write_json(out, told)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _show(told, str(model), display)
    if out is not None:
        display.say(f"answers: {out}")


def open_data(text: str, images: Path | None = None) -> ConversationDataset:
    """A LLaVA file, or a data set as a recipe names it: a preset or type, or a YAML mapping with `type` and options.

    Raises `DataError` where there is no such file or data set, or its options are wrong.
    """
    from pydantic import ValidationError
    from pydantic_core import PydanticCustomError

    from foveate.registry import load_registry, resolve
    from foveate.yaml_tree import Place, parse_yaml

    entry: Any = {"type": "llava", "path": text, **({} if images is None else {"images": str(images)})}
    if not _names_file(text):
        tree = parse_yaml(text, Path.cwd(), lambda line, column: Place("--data"))
        if tree.problems:
            raise DataError("; ".join(map(str, tree.problems)))
        entry = tree.root
    try:
        context = {"registry": load_registry([Path.cwd()])[0], "folder": Path.cwd()}
        chosen = resolve("datasets", entry, context, default="llava")
    except ValidationError as error:
        lines = [": ".join((*map(str, line["loc"]), line["msg"])) for line in error.errors()]
        raise DataError("\n".join(f"--data: {line}" for line in lines)) from None
    except PydanticCustomError as error:
        raise DataError(f"--data: {error}") from None
    found: ConversationDataset = chosen.cls(chosen.options)
    return found


def _names_file(data: str) -> bool:
    return data.endswith((".json", ".jsonl")) or Path(data).is_file()


def _is_run(model: Path) -> bool:
    """Whether `model` is a run; False for an export. Raises `RunError` where it is neither."""
    from foveate.loaded import check_run
    from foveate.run import RECIPE

    if (model / RECIPE).is_file():
        check_run(model.resolve())
        return True
    from foveate_lab.generation import export_type  # torch: only when there is something to open

    if export_type(model) is not None:
        return False
    if (model / "foveate.json").is_file():
        check_run(model.resolve())  # a model folder: it says where the run is
    what = "neither a run nor an exported Llava" if model.is_dir() else "no folder"
    raise RunError(f"{model} is {what}. Give what `foveate train` wrote, such as runs/NAME, or `foveate export`.")


def _check_out(out: Path) -> None:
    """What cannot be written is told before anything is computed."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file, such as {out / 'results.json'}.")
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--out {out}: {parent} is not a folder that can be written to.")


def _show(told: Mapping[str, Any], name: str, display: Any) -> None:
    """The tables: accuracy by type; and what is usual of yes-or-no questions, where there are some."""
    rows: list[tuple[str, Mapping[str, Any]]] = [*told["types"].items()]
    rows += [("all", told["overall"])] if len(rows) > 1 else []
    notes = ["from … to: 95 % confidence interval (Wilson)"]
    if told["unfinished"]:
        many = f"{told['unfinished']} of {told['overall']['n']} answers"
        notes.append(f"{many} did not end within {told['max_new_tokens']} tokens; --max-new-tokens allows more")
    display.table(
        f"{name}: {told['overall']['n']:,} questions",
        ("type", "metric", "n", "accuracy", "from", "to"),
        [(kind, ", ".join(row["metrics"]), row["n"], row["accuracy"], *row["interval"]) for kind, row in rows],
        notes,
    )
    asked = [(kind, row["yesno"]) for kind, row in rows if "yesno" in row]
    if asked:
        keys = ("n", "accuracy", "precision", "recall", "f1", "yes_ratio", "unclear")
        columns = ("type", *(key.replace("_", " ") for key in keys))
        note = "yes is positive; unclear: answers that say neither yes nor no, taken for yes as POPE does"
        display.table("yes or no", columns, [(kind, *(row[key] for key in keys)) for kind, row in asked], [note])
