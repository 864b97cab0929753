"""The data set ``digits`` as files: PNG pictures and conversations in LLaVA's format."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from foveate import Conversation
from foveate.errors import UserError
from foveate_lab.digits import DigitsDataset, picture

TRAINING_KINDS = ("presence", "identity", "colour", "count", "comparison", "where")


def write_llava(
    folder: Path, datasets: Mapping[str, DigitsDataset], advance: Callable[[], object] = lambda: None
) -> None:
    """Write each data set as ``NAME.json`` with its pictures in ``NAME/``: all of it, or nothing.

    Everything is written to a folder beside `folder`, which is renamed at the end; `advance` is called after every
    sample. Raises `UserError` when `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, dataset in datasets.items():
            (aside / name).mkdir()
            rows = []
            for index in range(len(dataset)):
                image = f"{name}/{index:06d}.png"
                picture(dataset.scene(index)).save(aside / image, compress_level=1)
                rows.append(llava_row(dataset[index], image))
                advance()
            (aside / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        aside.chmod(0o777 & ~_umask())
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def llava_row(conversation: Conversation, image: str) -> dict[str, Any]:
    """A conversation with one picture, `image`, as a row of a LLaVA file (``meta`` beside LLaVA's own keys)."""
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": speakers[turn.role], "value": turn.text} for turn in conversation.turns]
    row: dict[str, Any] = {"id": conversation.id, "image": image, "conversations": turns}
    return {**row, "meta": dict(conversation.meta)} if conversation.meta else row


def data_digits(
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist, or be empty.")],
    captions: Annotated[int, typer.Option(min=1, help="Training scenes with a caption: captions.json.")] = 10000,
    questions: Annotated[int, typer.Option(min=1, help="Training scenes with questions: questions.json.")] = 10000,
    per_scene: Annotated[int, typer.Option(min=1, help="Questions per training scene, in one conversation.")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out scenes with one question each: test.json.")] = 2500,
    density: Annotated[float, typer.Option(min=0, max=1, help="Probability that a cell holds a digit.")] = 0.7,
    cell_px: Annotated[int, typer.Option(min=8, max=128, help="Side of a cell in pixels.")] = 16,
    digit_px: Annotated[
        int | None, typer.Option(min=8, max=128, help="Side of a digit in pixels.", show_default="the cell's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds give other scenes.")] = 0,
) -> None:
    """Write the built-in data set `digits` as PNG pictures and LLaVA-format JSON."""
    if digit_px is not None and digit_px > cell_px:
        raise UserError(f"a digit of {digit_px} px does not fit into a cell of {cell_px} px: --cell-px, --digit-px")
    common: dict[str, Any] = {"density": density, "cell_px": cell_px, "digit_px": digit_px, "seed": seed}
    asked = {**common, "task": "questions"}
    options = {
        "captions": {**common, "task": "captions", "size": captions},
        "questions": {**asked, "size": questions, "questions": per_scene, "kinds": TRAINING_KINDS},
        "test": {**asked, "split": "test", "size": held_out},
    }
    datasets = {name: DigitsDataset(DigitsDataset.Options(**values)) for name, values in options.items()}
    console = Console(stderr=True)
    ticks = iter(track(range(captions + questions + held_out), "writing pictures", console=console, transient=True))
    write_llava(out, datasets, advance=lambda: next(ticks, None))
    next(ticks, None)
    written = ", ".join(f"{name}.json ({len(data):,} scenes)" for name, data in datasets.items())
    Console(highlight=False).print(f"{out}: {written}", soft_wrap=True)


def _umask() -> int:
    """The process's umask (reading it means setting it)."""
    current = os.umask(0)
    os.umask(current)
    return current
