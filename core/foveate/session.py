"""What all stages of a run share: processes and devices, the model, the tokenizer, the data, the run folder.

Everything that can be wrong is looked for before anything is computed: `Session.open` checks folder, data and model,
and creates the run folder last.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object

from foveate.assembly import assemble
from foveate.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from foveate.data.steps import StageData
from foveate.data_room import DataRoom
from foveate.errors import FoveateError, ModelError, RunError
from foveate.learner import Learner
from foveate.model.build import Blueprint, blueprint, load_strictly
from foveate.model.language import check_language_model
from foveate.model.lmm import LMM
from foveate.objective import VisionObjective, Weight
from foveate.plan import make_plan, render
from foveate.plugins import Plugins, installed_plugins
from foveate.precision import DTYPES, FrozenParts
from foveate.progress import Display
from foveate.recipe import Evaluate, Recipe, Stage
from foveate.run import Run
from foveate.targets import TeacherRoom

T = TypeVar("T")


class Interrupted(FoveateError):
    """Somebody asked for a stop; a checkpoint has been written."""

    exit_code = 130


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the loop grants after the step at hand. A second signal kills.

    Not one within three seconds of the first: a scheduler signals every process, and the launcher hands it on.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._first > 3.0:
            self.__exit__()
            signal.raise_signal(number)
        self.requested, self._first = True, min(self._first, time.monotonic())


@dataclass
class Session:
    """A run in progress: everything that its stages share."""

    recipe: Recipe
    run: Run
    accelerator: Accelerator
    plugins: Plugins
    plan: Blueprint
    data: DataRoom
    lmm: LMM
    learner: Learner
    display: Display
    frozen: FrozenParts
    stop: StopRequest
    checkpoint: Checkpoint | None = None
    """The newest one of a run that is resumed, until its stage has taken it."""
    fixed: set[int] = field(default_factory=set)
    """Ids of parameters that an objective froze when it was built: no rule trains them."""
    given: frozenset[str] = frozenset()
    """Objectives whose heads came with the model."""
    touched: set[str] = field(default_factory=set)
    """State-dict names of weights that have been trained in earlier stages."""

    @classmethod
    def open(cls, recipe: Recipe, display: Display, stop: StopRequest, resume: bool = False) -> Session:
        """Check recipe, data and folder; build tokenizer and model; create the run folder last of all.

        Raises `UserError` for whatever is wrong with them.
        """
        Run.check(recipe.output, resume)
        if recipe.hardware.threads:
            torch.set_num_threads(recipe.hardware.threads)
        plan = blueprint(recipe.model)
        data = DataRoom(recipe, plan)
        made = make_plan(recipe, data)
        AcceleratorState._reset_state()  # a process may train one recipe after another, in another precision
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # or launched processes would not know of each other
            mixed_precision="bf16" if recipe.precision.compute == "bf16" else "no",
            log_with=list(recipe.trackers) or None,
            project_dir=str(recipe.output),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        for stage in recipe.stages if accelerator.is_local_main_process else ():  # once a machine
            data.preflight(stage)
        if accelerator.is_main_process:
            render(made, display)
            many = f"{accelerator.num_processes} processes" if accelerator.num_processes > 1 else "1 process"
            display.say(f"{many}, the first on {accelerator.device}")
        else:
            display = Display(quiet=True)
        made_of = assemble(recipe, accelerator.device, data)
        lmm, learner = made_of.lmm, made_of.learner
        wishes = any(rule.call("attention") != "causal" for rule in learner.rules.values())
        check_language_model(lmm.llm, accelerator.device, wishes)
        for name in recipe.objectives:  # what is wrong with a teacher is told now
            learner.teachers.of(name)
        accelerator.wait_for_everyone()  # all have seen the folder before the main process fills it
        run = Run.start(recipe, data.fingerprints(), resume=resume, main=accelerator.is_main_process)
        frozen = FrozenParts(learner.teachers.full, DTYPES[recipe.precision.frozen])
        session = cls(recipe, run, accelerator, installed_plugins(), plan, data, lmm, learner, display, frozen, stop)
        heads = [parameter for objective in session.objectives.values() for parameter in objective.parameters()]
        session.fixed = {id(parameter) for parameter in heads if not parameter.requires_grad}
        session.given = made_of.given
        if recipe.trackers:
            accelerator.init_trackers(recipe.name, config={"recipe": str(run.folder)})
        if resume:
            session._restore()
        return session

    def close(self) -> None:
        """At the end: trackers finish. The process group stays, for another run of these processes."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _restore(self) -> None:
        """Weights of the newest checkpoint of the run; what is left of it waits for its stage."""
        folders = [latest_checkpoint(self.run.stage_folder(stage.name)) for stage in self.recipe.stages]
        [newest] = broadcast_object_list([next((folder for folder in reversed(folders) if folder), None)])
        names = [stage.name for stage in self.recipe.stages]
        if newest is None:
            self.run.cut_metrics(names, names[0], 0)
            return
        if not newest.is_dir():
            raise RunError(f"{newest} is not on every machine. They must share the run's folder.")
        self.checkpoint = load_checkpoint(newest)
        own = dict(self.lmm.named_parameters())
        weights = {name: tensor for name, tensor in self.checkpoint.tensors["model"].items() if ".lora_" not in name}
        if unknown := sorted(set(weights) - set(own)):
            raise ModelError(f"{newest} holds weights that the model lacks: {', '.join(unknown[:4])}")
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        if self.objectives:
            module, heads = self.learner.objectives, self.checkpoint.tensors.get("objectives", {})
            load_strictly(module, heads, ("",), f"the objectives in {newest}")
        self.touched = set(self.checkpoint.state["touched"])
        self.run.cut_metrics(names, self.checkpoint.state["stage"], self.checkpoint.state["step"])

    def finished(self, stage: Stage) -> bool:
        """Whether a resumed run is past this stage."""
        if self.checkpoint is None:
            return False
        names = [entry.name for entry in self.recipe.stages]
        at = names.index(self.checkpoint.state["stage"])
        return names.index(stage.name) < at + bool(self.checkpoint.state["finished"])

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def objectives(self) -> dict[str, VisionObjective]:
        """The recipe's objectives by name."""
        parts: Any = self.learner.objectives
        return dict(parts.items())

    @property
    def teachers(self) -> TeacherRoom:
        """Their teachers."""
        return self.learner.teachers

    def weight(self, part: str, stage: Stage) -> Weight:
        """The recipe's weight of a part of the loss in a stage."""
        options: Any = self.recipe.text if part == "text" else self.recipe.objectives[part].options
        weight: Weight = (stage.weights or {}).get(part, options.weight)
        return weight

    def stage_data(self, stage: Stage) -> StageData:
        """What this process trains on in a stage."""
        return self.data.stage(stage, self.accelerator.process_index, self.accelerator.num_processes)

    def held_out(self, stage: Stage) -> StageData | None:
        """The stage's held-out data, if it has any."""
        if stage.validate_ is None:
            return None
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return self.data.held_out(stage.validate_.data, stage, rank=rank, world=world)

    def evaluation_data(self, evaluate: Evaluate) -> StageData:
        """The held-out data of the end of the run, as the last stage reads it."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return self.data.held_out(evaluate.data, self.recipe.stages[-1], evaluate.template, rank, world, False)

    def sum_over_processes(self, values: Mapping[str, float]) -> dict[str, float]:
        """Named numbers, each added up over all processes that name it, in their order."""
        found: dict[str, float] = {}
        for own in self.of_all_processes([dict(values)]):
            for name, value in own.items():
                found[name] = found.get(name, 0) + value
        return found

    def of_all_processes(self, items: list[T]) -> list[T]:
        """The items of the first process, of the second, and so on; on every process."""
        return gather_object(items) if self.accelerator.num_processes > 1 else items

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`, the trackers, and everybody who listens."""
        if not self.accelerator.is_main_process:
            return
        self.run.log({"stage": stage, "step": step, **metrics})
        if self.recipe.trackers:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            shown = {f"{stage}/{name}".replace("~", "."): value for name, value in finite.items()}  # MLflow takes no ~
            self.accelerator.log(shown, step=step)
        self.plugins.hook.step_finished(run=self.run, stage=stage, step=step, metrics=dict(metrics))
