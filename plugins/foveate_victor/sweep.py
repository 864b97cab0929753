"""`foveate victor sweep RECIPE`: a recipe with several sizes of the pool, and a plot of what each answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.errors import RunError, UserError

EVALUATION = "evaluation.json"
_ACCURACY = "accuracy"


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe with the objective and `evaluate`.", metavar="RECIPE")],
    pool_size: Annotated[str, typer.Option(metavar="A,B,…", help="Rows of the pool.")] = "1,64,256,1024",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Of runs and plot.", show_default="runs/NAME")] = None,
    objective: Annotated[str, typer.Option(help="Its name in the recipe.")] = "victor",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key in all runs. Repeatable.")
    ] = None,
) -> None:
    """Train a recipe once for each size of ViCToR's pool, and plot held-out accuracy over sizes.

    Each run is `DIR/pool-SIZE`; the plot is `DIR/pool-size.png`, its numbers `DIR/pool-size.json`. Called again, it
    goes on with runs that were stopped.
    """
    sizes, changes = read_sizes(pool_size), override or []
    folder = _checked(recipe, objective, changes, out)
    found: dict[int, dict[str, float]] = {}
    for size in sizes:
        run = folder / f"pool-{size}"
        words = [f"objectives.{objective}.pool_size={size}", f"output={run}", *changes]
        command = [sys.executable, "-m", "foveate", "train", str(recipe), "--resume"]
        done = subprocess.run(command + [word for change in words for word in ("--set", change)])
        if done.returncode:
            raise RunError(f"the run with a pool of {size} has failed; its error stands above")
        found[size] = accuracies(json.loads((run / EVALUATION).read_text(encoding="utf-8")))
    (folder / "pool-size.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, folder / "pool-size.png")
    for size, values in found.items():
        typer.echo(f"pool of {size:>6,}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in values.items()))
    typer.echo(folder / "pool-size.png")


def read_sizes(text: str) -> list[int]:
    """Sizes in ascending order. Raises `UserError`."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--pool-size takes whole numbers from 1 on, such as 1,64,256; not '{text}'.")
    return sorted({int(word) for word in words})


def _checked(recipe: Path, objective: str, changes: Sequence[str], out: Path | None) -> Path:
    """Where runs go. Raises `UserError` for a recipe that cannot be swept."""
    from foveate import load_recipe

    loaded = load_recipe(recipe, changes)
    there = loaded.objectives.get(objective)
    if there is None or "pool_size" not in type(there.options).model_fields:
        known = ", ".join(loaded.objectives) or "none"
        raise UserError(f"{recipe} has no objective '{objective}' with a pool; there are: {known}. See --objective.")
    if loaded.evaluate is None:
        raise UserError(f"{recipe} has no `evaluate`, so there would be nothing to plot.")
    folder = out or Path("runs") / f"{loaded.name}-pool-size"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def accuracies(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Kind of question → accuracy, from a run's evaluation, and `mean` over the kinds. Raises `UserError`."""
    end = f"/{_ACCURACY}"
    values = {
        key.removesuffix(end): float(value)
        for evaluation in evaluations
        for key, value in evaluation["values"].items()
        if key.endswith(end)
    }
    if not values:
        raise UserError(f"the evaluation has no value …{end}; the metric `answers` gives them")
    return {"mean": sum(values.values()) / len(values), **values}


def plot(found: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """Accuracy over sizes: the mean, and each kind of question. A pool of one row is a mask."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=130, layout="constrained")
    axes, sizes = figure.subplots(), list(found)
    for kind in next(iter(found.values())):
        mean = kind == "mean"
        look: dict[str, Any] = {"linewidth": 2.5, "color": "black"} if mean else {"linewidth": 1, "alpha": 0.7}
        axes.plot(sizes, [found[size].get(kind, float("nan")) for size in sizes], marker="o", label=kind, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set(xlabel="rows of the pool", ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
