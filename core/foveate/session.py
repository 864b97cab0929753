"""What all stages of a run share: processes and devices, the model, the tokenizer, the data, the run folder.

Everything that can be wrong is looked for before anything is computed: `Session.open` checks folder, data and model,
and creates the run folder last.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from foveate.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from foveate.data.check import check
from foveate.data.dataset import ConversationDataset, texts
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules
from foveate.data.steps import StageData
from foveate.data.templates import load_template
from foveate.data.tokenizer import load_tokenizer, train_tokenizer
from foveate.errors import DataError, FoveateError, ModelError
from foveate.learner import Learner
from foveate.model.build import Blueprint, blueprint, build_lmm
from foveate.model.language import TrainedTokenizer, check_language_model
from foveate.model.lmm import LMM
from foveate.plan import make_plan, render
from foveate.plugins import Plugins, installed_plugins
from foveate.precision import DTYPES, FrozenParts
from foveate.progress import Display
from foveate.recipe import DataSource, Evaluate, Recipe, Stage
from foveate.run import Run


class Interrupted(FoveateError):
    """Somebody asked for a stop; a checkpoint has been written."""

    exit_code = 130


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the loop grants after the step at hand. A second signal kills."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()


class DataRoom:
    """The data of a recipe: each source opened once, the tokenizer, and what the model's shape says of a sample."""

    def __init__(self, recipe: Recipe, plan: Blueprint) -> None:
        self.recipe, self.plan = recipe, plan
        self._open: dict[int, ConversationDataset] = {}

    def sources(self, data: Sequence[DataSource]) -> list[Source]:
        """The data sets of a stage, opened, with their weights."""
        for entry in data:
            if id(entry) not in self._open:
                self._open[id(entry)] = entry.dataset.cls(entry.dataset.options)
        files = [Path(getattr(entry.dataset.options, "path", entry.dataset.type)).name for entry in data]
        return [
            Source(self._open[id(entry)], entry.weight, entry.max_samples, name)
            for entry, name in zip(data, files, strict=True)
        ]

    def fingerprints(self) -> dict[str, str]:
        """Stage and number of each source → fingerprint of its content."""
        return {
            f"{stage.name}.{number}": source.dataset.fingerprint()
            for stage in self.recipe.stages
            for number, source in enumerate(self.sources(stage.data))
        }

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Loaded with the LLM, or trained on the text of all stages."""
        wish = self.plan.tokenizer
        if isinstance(wish, str):
            return load_tokenizer(wish).tokenizer
        lines = (
            text
            for stage in self.recipe.stages
            for source in self.sources(stage.data)
            for text in texts(source.dataset)
        )
        return train_tokenizer(lines, (wish or TrainedTokenizer()).vocab_size)

    def rules(self, stage: Stage, template: str | None = None) -> SampleRules:
        """How a stage turns conversations into samples."""
        return SampleRules(
            tokenizer=self.tokenizer,
            template=load_template(template or stage.template, self.tokenizer, stage.system),
            encoder=self.plan.encoder_spec(),
            visual_grid=self.plan.visual_grid(),
            geometry=stage.geometry,
            max_length=stage.max_length,
            on_long=stage.on_long_sample,
        )

    def stage(self, stage: Stage, rank: int = 0, world: int = 1) -> StageData:
        """What a stage trains on, by optimizer step."""
        hardware, number = self.recipe.hardware, self.recipe.stages.index(stage)
        return StageData(
            self.sources(stage.data), self.rules(stage), batch_size=stage.batch_size,
            seed=self.recipe.seed * 1009 + number, budget=hardware.tokens_per_microbatch, rank=rank, world=world,
            on_bad=stage.on_bad_sample, max_bad_rate=stage.max_bad_rate, workers=hardware.workers,
            prefetch=hardware.prefetch, epochs=stage.epochs, max_steps=stage.max_steps,
        )  # fmt: skip

    def held_out(
        self, data: Sequence[DataSource], stage: Stage, template: str | None = None, rank: int = 0, world: int = 1
    ) -> StageData:
        """Held-out data in their own order, once."""
        hardware = self.recipe.hardware
        return StageData(
            self.sources(data), self.rules(stage, template), batch_size=stage.batch_size * 2, epochs=1,
            budget=hardware.tokens_per_microbatch, rank=rank, world=world, on_bad=stage.on_bad_sample,
            max_bad_rate=stage.max_bad_rate, workers=hardware.workers, prefetch=hardware.prefetch, shuffle=False,
        )  # fmt: skip

    def preflight(self, stage: Stage) -> None:
        """Read up to `check_samples` samples of each source whole, pictures included. Raises `DataError` with the first
        defects of each kind, unless the stage skips them and they are few enough."""
        asked: list[tuple[Sequence[DataSource], str | None]] = [(stage.data, None)]
        if stage.validate_:
            asked.append((stage.validate_.data, None))
        if stage is self.recipe.stages[-1] and self.recipe.evaluate:
            asked.append((self.recipe.evaluate.data, self.recipe.evaluate.template))
        for data, template in asked:
            workers = self.recipe.hardware.workers
            found = check(self.sources(data), self.rules(stage, template), workers, limit=stage.check_samples)
            dropped = [entry for entry in found.defects if entry.kind == "long" and stage.on_long_sample == "drop"]
            bad = [entry for entry in found.defects if entry not in dropped]
            allowed = found.samples * stage.max_bad_rate if stage.on_bad_sample == "skip" else 0
            if len({(entry.source, entry.index) for entry in bad}) > allowed:
                lines = [f"  {entry}" for entry in bad[:8]]
                lines += [f"  and {len(bad) - 8} more"] if len(bad) > 8 else []
                skip = f"; they are more than max_bad_rate: {stage.max_bad_rate:g} lets you skip"
                skip = skip if stage.on_bad_sample == "skip" else ", or set on_bad_sample: skip"
                many = "1 defect" if len(bad) == 1 else f"{len(bad)} defects"
                raise DataError(
                    f"stage {stage.name}: {many} in the {found.samples} samples that were checked\n"
                    + "\n".join(lines)
                    + f"\nMend the data (`foveate data check RECIPE` lists all defects){skip}."
                )


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
        for stage in recipe.stages:
            data.preflight(stage)
        if accelerator.is_main_process:
            render(made, display)
        else:
            display = Display(quiet=True)
        set_seed(recipe.seed)
        lmm = build_lmm(plan, len(data.tokenizer))
        full = DTYPES["fp64" if recipe.precision.compute == "fp64" else "fp32"]
        lmm.to(device=accelerator.device, dtype=full)
        check_language_model(lmm.llm, accelerator.device)
        accelerator.wait_for_everyone()  # all have seen the folder before the main process fills it
        run = Run.start(recipe, data.fingerprints(), resume=resume, main=accelerator.is_main_process)
        frozen = FrozenParts(full, DTYPES[recipe.precision.frozen])
        session = cls(
            recipe, run, accelerator, installed_plugins(), plan, data, lmm, Learner(lmm), display, frozen, stop
        )
        if recipe.trackers:
            accelerator.init_trackers(recipe.name, config={"recipe": str(run.folder)})
        if resume:
            session._restore()
        return session

    def _restore(self) -> None:
        """Weights of the newest checkpoint of the run; what is left of it waits for its stage."""
        folders = [latest_checkpoint(self.run.stage_folder(stage.name)) for stage in self.recipe.stages]
        newest = next((folder for folder in reversed(folders) if folder), None)
        names = [stage.name for stage in self.recipe.stages]
        if newest is None:
            self.run.cut_metrics(names, names[0], 0)
            return
        self.checkpoint = load_checkpoint(newest)
        own = dict(self.lmm.named_parameters())
        weights = {name: tensor for name, tensor in self.checkpoint.tensors["model"].items() if ".lora_" not in name}
        if unknown := sorted(set(weights) - set(own)):
            raise ModelError(f"{newest} holds weights that the model lacks: {', '.join(unknown[:4])}")
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
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

    def weight(self, part: str) -> float:
        """The recipe's weight of a part of the loss."""
        return self.recipe.text.weight

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
        return self.data.held_out(evaluate.data, self.recipe.stages[-1], evaluate.template, rank, world)

    def sum_over_processes(self, values: Mapping[str, float]) -> dict[str, float]:
        """Named numbers, each added up over all processes (which must all name the same)."""
        if self.accelerator.num_processes == 1:
            return dict(values)
        names = sorted(values)
        local = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        return dict(zip(names, self.accelerator.reduce(local, "sum").tolist(), strict=True))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`, the trackers, and everybody who listens."""
        if not self.accelerator.is_main_process:
            return
        self.run.log({"stage": stage, "step": step, **metrics})
        if self.recipe.trackers:
            shown = {f"{stage}/{name}": value for name, value in metrics.items() if math.isfinite(value)}
            self.accelerator.log(shown, step=step)
        self.plugins.hook.step_finished(run=self.run, stage=stage, step=step, metrics=dict(metrics))
