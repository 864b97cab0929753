"""`foveate asvr fit-tokenizer RECIPE --out DIR` and `foveate import tokenizer CKPT OUT`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]


def fit_tokenizer(
    recipe: Annotated[Path, typer.Argument(help="A recipe with an objective `asvr`.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option(help="Folder to make: for `tokenizer: {pretrained: DIR}`.", metavar="DIR")],
    objective: Annotated[str | None, typer.Option(help="Which objective, where the recipe has several.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the recipe. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn a recipe's tokenizer from its pictures before training: codebooks, for `appearance` a decoder too.

    With `target: both` the folder holds one tokenizer as semantic/ and one as appearance/.
    """
    from foveate import load_recipe
    from foveate.errors import RunError
    from foveate.progress import Display

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder: choose another, or remove it first.")
    loaded = load_recipe(recipe, overrides or ())
    name = _objective(loaded, objective)
    from foveate_asvr.fitting import fit

    display, told = Display(), dict[str, Any]()
    for folder, kind, numbers in fit(loaded, name, out):
        told[str(folder)] = numbers
        if not as_json:
            columns, rows = _by_depth(numbers)
            single = [f"{key} {value:.4g}" for key, value in numbers.items() if "/" not in key]
            display.table(f"{folder}: {kind} tokenizer", columns, rows, single)
            key = "appearance" if kind == "appearance" else "tokenizer"
            display.say(f"in a recipe: objectives: {{{name}: {{{key}: {{pretrained: {folder}}}}}}}")
    if as_json:
        typer.echo(json.dumps(told, indent=2))


def _objective(recipe: Any, wanted: str | None) -> str:
    """The name of the objective whose tokenizer is to be fitted. Raises `UserError` where there is none, or several."""
    from foveate.errors import UserError
    from foveate_asvr.objective import Asvr

    found = [name for name, component in recipe.objectives.items() if issubclass(component.cls, Asvr)]
    if wanted is not None and wanted not in found:
        raise UserError(f"--objective {wanted}: the recipe's objectives of type asvr are {', '.join(found) or 'none'}")
    if wanted is None and len(found) != 1:
        problem = f"has several: say which by --objective ({', '.join(found)})" if found else "has none"
        raise UserError(f"fit-tokenizer takes a recipe with an objective of type asvr; this one {problem}")
    return wanted or found[0]


def _by_depth(numbers: dict[str, float]) -> tuple[tuple[str, ...], list[tuple[float, ...]]]:
    """What a fit told, as columns and a row a depth."""
    names = list(dict.fromkeys(key.partition("/")[0] for key in numbers if "/" in key))
    depths = sorted({int(key.partition("/")[2]) for key in numbers if "/" in key})
    return ("depth", *names), [(depth, *(numbers[f"{name}/{depth}"] for name in names)) for depth in depths]


def import_tokenizer(
    checkpoint: Annotated[Path, typer.Argument(help="The file: .safetensors, .bin, .pt or .pth.", metavar="CKPT")],
    out: Annotated[Path, typer.Argument(help="Folder to make: for `tokenizer: {pretrained: OUT}`.", metavar="OUT")],
    layer: Annotated[
        int | None, typer.Option(min=0, help="The block whose output is quantised. Default: the last but one.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the encoder's pictures in pixels.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of the encoder.")] = None,
    as_json: Json = False,
) -> None:
    """Read a published semantic tokenizer: its SigLIP, and codebooks quantizer_semantic.codebooks.D.weight.

    Only tensors are read. Whatever is missing or does not fit is an error; what is left unread is told.
    """
    from foveate.progress import Display
    from foveate_asvr import published

    found = published.import_tokenizer(checkpoint, out, layer, image_size, heads)
    card, display = found.card, Display()
    if as_json:
        facts = {"depth": card.depth, "codebook_size": card.codebook_size, "width": card.width, "layer": card.layer}
        told = {**facts, "folder": str(out), "parameters": found.parameters, "unread": dict(found.unread)}
        typer.echo(json.dumps(told, indent=2))
        return
    rows, columns = card.grid
    books = f"{card.depth} codebooks of {card.codebook_size:,} codes, {card.width} wide"
    display.say(f"{out}: {books}; the padding row of each is left out")
    read = f"block {card.layer} of {found.blocks}, {card.spec.image_size} pixels, {rows} x {columns} rows"
    display.say(f"encoder: SigLIP, {read}, {found.parameters:,} parameters")
    for name, count in found.unread.items():
        display.say(f"not read: {name}, {count} tensors")
    display.say(f"in a recipe: objectives: {{asvr: {{tokenizer: {{pretrained: {out}}}}}}}; with `reuse: true` it reads")
    display.say("the pass of the model's own encoder, whose weights must then be the same bit for bit")
