"""What foveate brings along to try it with: the data set ``digits``, its export, and answers' accuracy."""

from foveate import hookimpl
from foveate.hookspecs import Register

HOOK_API = 1


@hookimpl
def register_datasets(register: Register) -> None:
    register("digits", "foveate_lab.digits:DigitsDataset")


@hookimpl
def register_metrics(register: Register) -> None:
    register("answers", "foveate_lab.answers:AnswersMetric")


@hookimpl
def register_commands(register: Register) -> None:
    register("data digits", "foveate_lab.export:data_digits")
