"""`foveate analyze attention RUN_A RUN_B` and `foveate analyze conditions RUN`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foveate.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

    from foveate import LoadedRun
    from foveate_ross.attention import Looks, Question

Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the accelerator, where there is one")
]


def attention(
    run_a: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN_A", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="The run to compare it with.", metavar="RUN_B", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="LLaVA file, JSON or JSONL.", show_default="what both recipes evaluate"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the FILE's pictures.", show_default="the FILE's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, metavar="N", help="Only the first N questions.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of JSON and plot.", show_default="RUN_B/attention")
    ] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and arithmetic.")] = "fp32",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare how much two models look at the images as they begin to answer (Table 1 of arXiv 2410.09575)."""
    from foveate.loaded import check_run

    for run in (run_a, run_b):
        check_run(run.resolve())
    if images is not None and data is None:
        raise UserError("--images is the folder of a file's pictures: give --data FILE too.")
    folder = _folder(out or run_b / "attention")

    from foveate import __version__
    from foveate.files import write_json
    from foveate.precision import find_device
    from foveate.progress import Display
    from foveate_ross.attention import compare, plot, same

    display, place = Display(), find_device(device)
    looks, questions, blind = list["Looks"](), list["Question"](), 0
    for run in (run_a, run_b):  # one model after the other is in memory
        found, asked, blind = _looked(run, data, images, limit, precision, place, display)
        if questions and (problem := same(questions, asked)):
            raise UserError(
                f"{run_a} and {run_b} do not evaluate the same questions: {problem}. Give the same to both with --data."
            )
        questions = asked
        looks.append(found)
    if len(questions) < 2:
        raise UserError("there is one question: a comparison needs two at least.")
    names, tests = _names(run_a, run_b), compare(*looks)
    plot(dict(zip(names, looks, strict=True)), folder / "attention.png")
    summaries = [found.summary() for found in looks]
    told = {
        "foveate": __version__, "data": None if data is None else str(data.resolve()), "questions": len(questions),
        "without_picture": blind, "precision": precision,
        "runs": [
            {"run": str(run.resolve()), **summary} for run, summary in zip((run_a, run_b), summaries, strict=True)
        ],
        "tests": tests,
        "by_question": [
            {"id": question.conversation.id, "mean": [float(one.means[at]) for one in looks],
             "share": [float(one.shares[at]) for one in looks]}
            for at, question in enumerate(questions)
        ],
    }  # fmt: skip
    write_json(folder / "attention.json", told)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    keys = ("mean", "p25", "median", "p75", "p95")
    rows: list[tuple[str | float, ...]] = [
        (name, *(1e4 * summary[key] for key in keys), summary["share"])
        for name, summary in zip(names, summaries, strict=True)
    ]
    notes = [f"{title}: p = {_p(tests[key]['p'])}, two-sided" for key, title in _TESTS.items()]
    notes += [f"left out: {blind} questions without a picture"] if blind else []
    title = f"Attention of the prompt's last token on a visual token (1e-4), {len(questions):,} questions"
    display.table(title, ("run", *keys, "on images"), rows, notes)
    display.say(f"plot and numbers: {folder}")


_TESTS = {"welch": "Welch's t-test of the means", "mann_whitney": "Mann-Whitney U"}


def conditions(
    run: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN", show_default=False)],
    objective: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which one.", show_default="the run's only one of ROSS")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Images.")] = 256,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise.", show_default="the recipe's")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare the loss of ROSS with each image's own LLM states and, noise the same, with another image's."""
    from foveate.loaded import check_run
    from foveate.run import Run

    check_run(run.resolve())
    if not Run(run).recipe()["objectives"]:
        raise RunError(f"{run}: its recipe has no objectives, so there are no conditions to swap.")

    from foveate import load_run
    from foveate.precision import find_device
    from foveate.progress import Display
    from foveate_ross.conditions import swapped_conditions

    display = Display()
    told = swapped_conditions(load_run(run, device=find_device(device)), objective, count, seed=seed).summary()
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    quarters = told["by_time"]
    rows: list[tuple[Any, ...]] = [
        (title, told[side], *(quarter[side] for quarter in quarters))
        for title, side in (("the image's own", "own"), ("another image's", "swapped"))
    ]
    columns = ("states", "loss", *(f"t {number * 250}…{number * 250 + 249}" for number in range(len(quarters))))
    low, high = told["interval"]
    notes = [
        f"gap {told['gap']:.4g}, standard error {told['standard_error']:.2g}, 95 % interval {low:.4g} … {high:.4g}",
        f"another image's states are worse for {told['hurt']:.1%} of the images",
    ]
    if told["data"] == "train":
        notes.append("on training data: the recipe has neither `evaluate` nor `validate` with images for it")
    display.table(f"{run}: {told['objective']}, {told['images']:,} images", columns, rows, notes)


def _looked(
    run: Path, data: Path | None, images: Path | None, limit: int | None, precision: str, place: torch.device,
    display: Any,
) -> tuple[Looks, list[Question], int]:  # fmt: skip
    """What a run looks at, what it was asked, and how many questions show no picture."""
    from foveate import load_run
    from foveate.precision import DTYPES
    from foveate_ross.attention import look, read_questions

    loaded = load_run(run, device="cpu")  # cast before it goes to the accelerator
    rows, template = _rows(loaded, run, data, images)
    questions, blind = read_questions(rows, limit)
    with display.counting(f"asking {run.name}", len(questions)) as done:
        return look(loaded, questions, template, DTYPES[precision], place, done), questions, blind


def _rows(loaded: LoadedRun, run: Path, data: Path | None, images: Path | None) -> tuple[Any, str | None]:
    """What is asked, and by which template. Raises `DataError` or `UserError` where there is nothing."""
    from foveate.data.llava import LlavaDataset
    from foveate.data.mixture import Mixture
    from foveate.errors import DataError

    if data is not None:
        for place in (data, images):
            if place is not None and not place.exists():
                raise DataError(f"no such file or folder: {place}")
        return LlavaDataset(LlavaDataset.Options.model_validate({"path": data.resolve(), "images": images})), None
    wish = loaded.recipe.evaluate
    if wish is None:
        raise UserError(f"{run}: its recipe has no `evaluate`, or its data are not here any more: give --data.")
    return _Joined(Mixture(loaded.data.sources(wish.data), shuffle=False)), wish.template


class _Joined:
    """The rows of an evaluation, one source after the other."""

    def __init__(self, mixture: Any):
        self._mixture = mixture

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, index: int) -> Any:
        source, row = self._mixture.sample_at(0, index)
        return self._mixture.sources[source].dataset[row]


def _names(run_a: Path, run_b: Path) -> Sequence[str]:
    """What tables and plots call two runs: their folders' names, where these differ."""
    a, b = run_a.resolve(), run_b.resolve()
    if a.name != b.name:
        return a.name, b.name
    return (str(run_a), str(run_b)) if a != b else (f"{a.name} (A)", f"{b.name} (B)")


def _folder(out: Path) -> Path:
    """The folder, made. Raises `UserError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}.") from None
    return out


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"
