"""What foveate brings along to try it with: the data set ``digits``, its export, evaluation, a run's curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate import hookimpl
from foveate.hookspecs import Register

if TYPE_CHECKING:
    from foveate.run import Run

HOOK_API = 1


@hookimpl
def register_datasets(register: Register) -> None:
    register("digits", "foveate_lab.digits:DigitsDataset")


@hookimpl
def register_metrics(register: Register) -> None:
    register("answers", "foveate_lab.answers:AnswersMetric")


@hookimpl
def register_commands(register: Register) -> None:
    register("compare", "foveate_lab.compare:compare")
    register("data digits", "foveate_lab.export:data_digits")
    register("eval", "foveate_lab.eval_cli:eval_model")


@hookimpl
def report_sections(run: Run) -> list[tuple[str, str]]:
    from foveate_lab.report import sections  # matplotlib, only when a run ends

    return sections(run)
