"""The hooks of foveate: the whole contract between core and any plugin, its own included.

A plugin is a module (or object) named by an entry point of group ``foveate``. It declares ``HOOK_API = 1`` and
implements any of these functions with ``@foveate.hookimpl``. Registration is light: give ``register`` either the class
or the string ``"module:Class"``, which is imported when a recipe first uses the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from foveate.run import Run

HOOK_API = 1
"""Version of this contract; a plugin that declares another is refused."""

hookspec = pluggy.HookspecMarker("foveate")
hookimpl = pluggy.HookimplMarker("foveate")

Register = Callable[[str, "type | Callable[..., Any] | str"], None]
"""`register(name, class or "module:Class")`."""


@hookspec
def register_encoders(register: Register) -> None:
    """Register subclasses of `foveate.Encoder`."""


@hookspec
def register_projectors(register: Register) -> None:
    """Register subclasses of `foveate.Projector`."""


@hookspec
def register_llms(register: Register) -> None:
    """Register subclasses of `foveate.LanguageModel`."""


@hookspec
def register_objectives(register: Register) -> None:
    """Register subclasses of `foveate.VisionObjective`."""


@hookspec
def register_teachers(register: Register) -> None:
    """Register subclasses of `foveate.Teacher`: frozen makers of targets that several objectives share."""


@hookspec
def register_datasets(register: Register) -> None:
    """Register subclasses of `foveate.ConversationDataset`."""


@hookspec
def register_metrics(register: Register) -> None:
    """Register subclasses of `foveate.Metric`, evaluated on held-out data at the end of a run."""


@hookspec
def register_commands(register: Register) -> None:
    """Register commands: `register("data digits", function)` adds ``foveate data digits``; typer reads the function."""


@hookspec
def stage_started(run: Run, stage: str) -> None:
    """A stage begins; called on the main process."""


@hookspec
def step_finished(run: Run, stage: str, step: int, metrics: dict[str, float]) -> None:
    """An optimizer step is done; `metrics` is its line of `metrics.jsonl`. Called on the main process."""


@hookspec
def stage_finished(run: Run, stage: str) -> None:
    """A stage is done and its weights are in place; called on the main process."""


@hookspec
def checkpoint_saved(run: Run, stage: str, step: int, folder: str) -> None:
    """A checkpoint is complete in `folder`; called on the main process."""


@hookspec
def report_sections(run: Run) -> list[tuple[str, str]]:
    """Sections of `RUN/report.html` as (title, HTML without scripts); called on the main process at the run's end."""
    return []
