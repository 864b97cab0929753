"""`foveate compare RECIPE …`: variants of recipes, each with several seeds, in one table and one plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foveate.errors import RunError, UserError
from foveate_lab.compare_words import check_overrides, read_seeds, read_vary


def compare(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes with the same `evaluate`.", metavar="RECIPE", show_default=False)
    ],
    vary: Annotated[
        str | None, typer.Option(metavar="KEY=A,B,…", help="Train each recipe with each of these values of a key.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="S,T,…", help="Train each variant with each of these seeds.")] = "0",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key in all runs. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of runs, table and plot.", show_default="runs/NAME…")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")] = False,
) -> None:
    """Train variants of recipes, and compare what they answer: one table, one plot.

    Each run is `DIR/VARIANT/seed-S`; `DIR/comparison.json` and `.png` tell all.
    Called again, it trains what is missing, and goes on where it was stopped.
    """
    varied, numbers, changes = read_vary(vary) if vary is not None else None, read_seeds(seeds), override or []
    check_overrides(changes, varied)
    _check_alone()
    from foveate.files import write_json
    from foveate.progress import Display
    from foveate_lab.compare_plot import plot
    from foveate_lab.compare_results import NUMBERS, PLOT, Comparison
    from foveate_lab.compare_runs import PlannedRun, train_all
    from foveate_lab.compare_variants import default_folder, read_variants

    variants = read_variants(recipes, varied, changes)
    folder = out or default_folder(variants, varied)
    runs = [PlannedRun(entry, seed, folder / entry.name / f"seed-{seed}") for seed in numbers for entry in variants]
    for run in runs:
        run.check()
    _make(folder)
    display, there = Display(), sum(run.complete() for run in runs)
    many = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    display.say(f"{many} in {folder}; complete already: {there}")
    results = train_all(runs, display)
    comparison = Comparison(
        varied.key if varied else None,
        numbers,
        {entry.name: {seed: results[entry.name, seed] for seed in numbers} for entry in variants},
        {entry.name: entry.facts(varied is not None) for entry in variants},
    )
    write_json(folder / NUMBERS, comparison.to_json())
    plot(comparison, folder / PLOT)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
    else:
        display.table(*comparison.table())
    display.say(f"plot: {folder / PLOT}; every number: {folder / NUMBERS}")


def _check_alone() -> None:
    from foveate.processes import launched

    if launched() > 1:
        raise UserError(
            f"this was launched as {launched()} processes, and each would train all runs. Launch one, or train the "
            "runs DIR/VARIANT/seed-S yourself first (docs/comparing.md)."
        )


def _make(folder: Path) -> None:
    """Raises `RunError` where the folder cannot be made or used."""
    from foveate.run import RECIPE

    if (folder / RECIPE).is_file():
        raise RunError(f"{folder} is itself a run. Give another --out for those of the comparison.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}. Give another --out.") from error
