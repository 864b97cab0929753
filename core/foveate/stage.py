"""One stage of a recipe: its optimizer steps, and nothing else. The one loop, whatever it trains."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from foveate.checkpoint import checkpoint_folder, load_optimizer_state, optimizer_state, save_checkpoint
from foveate.data.steps import StageData, StepBatches
from foveate.errors import TrainingError
from foveate.gradients import GradientProbe
from foveate.learner import StepOutput
from foveate.model.lmm import PARTS
from foveate.objective import Moment, VisionObjective, weight_at
from foveate.optim import (
    MovementCheck,
    TrainedPart,
    clip_gradients,
    make_optimizer,
    merge_lora,
    part_parameters,
    schedule_factor,
    set_learning_rates,
)
from foveate.progress import StageProgress
from foveate.recipe import Stage
from foveate.rehearsal import allocate_state, check_space, memory_errors, without_a_trace
from foveate.session import Interrupted, Session
from foveate.tally import Tally
from foveate.targets import called

MOVEMENT_STEPS = 3
"""Steps after which a trained part that has not moved is an error."""


class StageLoop:
    """The steps of one stage. `run` starts where the newest checkpoint of the stage ends."""

    def __init__(self, session: Session, stage: Stage, data: StageData) -> None:
        self.session, self.stage, self.data = session, stage, data
        self.modules: dict[str, nn.Module] = {name: getattr(session.lmm, name) for name in PARTS}
        self.modules |= session.objectives
        self.active = {name: session.objectives[name] for name in session.recipe.active(stage)}
        self.seen: set[str] = set()  # parts of the loss that have taken part with a weight
        self.parts = self._freeze_and_train()
        self.optimizer = make_optimizer(self.parts, stage.weight_decay, stage.betas)
        self.step = 0
        self.learner: nn.Module = session.learner
        self.stopping = False

    def _freeze_and_train(self) -> list[TrainedPart]:
        """Frozen parts into their dtype and evaluation mode, trained ones into full precision and training mode."""
        rules = self.stage.train
        for name, module in self.modules.items():
            whole = [rule for rule_name, rule in rules.items() if rule_name.partition(".")[0] == name]
            if whole and not any(rule.lora for rule in whole):
                self.session.frozen.thaw(name, module)
            elif name in PARTS:  # an objective stays in full precision
                self.session.frozen.freeze(name, module)
            module.train(bool(whole))
        return part_parameters(self.modules, rules, self.session.fixed)

    def run(self) -> None:
        """Train to the end of the stage, or until somebody asks for a stop; then leave a checkpoint."""
        session, stage = self.session, self.stage
        self._resume()
        movement = MovementCheck(self.modules, self.parts, session.fixed) if self.step == 0 else None
        self.learner, optimizer = session.accelerator.prepare(session.learner, self.optimizer)
        with self._memory_savers():
            self._rehearse()
            with session.display.stage(stage.name, self.data.total_steps, self.step) as bar:
                self._take_steps(optimizer, bar, movement)
        self._finish()

    def _take_steps(self, optimizer: Any, bar: StageProgress, movement: MovementCheck | None) -> None:
        """All that are left, with their validations and checkpoints."""
        session, stage, total = self.session, self.stage, self.data.total_steps
        work: StepBatches
        for work, waited in timed(self.data.steps(self.step)):
            started = time.perf_counter()
            rates = set_learning_rates(self.optimizer, schedule_factor(stage.schedule, self.step, total, stage.warmup))
            metrics = self._take_step(work, optimizer)
            self.step += 1
            if movement is not None and self.step == min(MOVEMENT_STEPS, total):
                waiting = self.active.keys() - self.seen
                idle = [part.name for part in self.parts if not self.seen or part.name.partition(".")[0] in waiting]
                movement.verify(f"stage {stage.name}, step {self.step}", idle)
                movement = None
            metrics |= {f"lr/{part}": rate for part, rate in rates.items()}
            metrics |= {"step_seconds": time.perf_counter() - started + waited, "data_wait": waited}
            if self._due(stage.validate_.every if stage.validate_ else None) or self.step == total:
                metrics |= self._validate()
            session.log(stage.name, self.step, metrics)
            bar.advance(self.step, metrics)
            if self.stopping or self._due(session.recipe.checkpoint_every):
                self.save()
            if self.stopping and self.step < total:
                where = f"step {self.step} of stage {stage.name}"
                raise Interrupted(f"stopped after {where}; the same command with --resume goes on")

    def _rehearse(self) -> None:
        """The largest micro-batches, the optimizer's state and a checkpoint are tried, and leave no trace.

        Raises `TrainingError` where memory, `RunError` where the disk does not suffice.
        """
        session, name = self.session, self.stage.name
        moment, told = Moment(session.recipe.seed, f"{name}, rehearsal"), list[str]()
        with without_a_trace(session.learner, session.device):
            with memory_errors(f"the optimizer's state of stage {name}"):
                allocate_state(self.optimizer)
            for work in self.data.largest():
                told.append(f"{work.tokens:,} tokens and {work.images:,} images")
                with memory_errors(f"the largest micro-batch of stage {name}, {told[-1]}"):
                    output: StepOutput = self.learner(work.batches[0].to(session.device), moment, self.active)
                    terms = self._terms(output, dict.fromkeys(output.terms, 1.0))
                    probe = self._probe(self.active, session.recipe.gradients_every is not None)
                    probe.add(terms)
                    session.accelerator.backward(added(terms))
                    probe.metrics(session.accelerator)
        if self.step == 0:
            folder, every = self.save(), session.recipe.checkpoint_every
            if session.accelerator.is_main_process:
                check_space(folder, self.data.total_steps // every if every else 0)
        if session.device.type == "cuda":
            told.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
        session.display.say(f"{name}: tried the largest micro-batch: {'; '.join(told)}")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _take_step(self, work: StepBatches, optimizer: Any) -> dict[str, float]:
        """Forward and backward of every micro-batch, one division by the step's counts, one update."""
        session, moment = self.session, Moment(self.session.recipe.seed, self.stage.name, self.step)
        torch.manual_seed(moment.seed_of("step", session.accelerator.process_index))  # dropout's draws, also resumed
        counts = session.sum_over_processes(
            {
                **work.counts, "samples": work.samples, "images": work.images, "tokens": work.tokens,
                "stop": session.stop.requested,
            }
        )  # fmt: skip
        self.stopping = counts["stop"] > 0  # all processes stop after the same step
        taking_part = {name for name, part in self.active.items() if part.options.takes_part(name, moment)}
        resting = self._resting(taking_part)
        every = session.recipe.gradients_every
        tally, probe = Tally(), self._probe(taking_part, every is not None and (self.step + 1) % every == 0)
        for number, batch in enumerate(work.batches, 1):
            last = number == len(work.batches)
            with contextlib.nullcontext() if last else session.accelerator.no_sync(self.learner):
                output: StepOutput = self.learner(batch.to(session.device), moment, taking_part)
                terms = self._terms(output, counts)
                probe.add(terms)
                loss = added(terms)
                share = session.accelerator.num_processes  # undoes the average that DDP takes over processes
                if share > 1:  # every process gives every parameter a gradient
                    loss = loss + sum((parameter.sum() * 0.0 for parameter in resting), start=loss * 0.0)
                session.accelerator.backward(share * loss)
            tally.add(output, batch)
        losses = self._means(tally, counts)
        gradients = probe.metrics(session.accelerator)
        where = f"stage {self.stage.name}, step {self.step + 1} (samples {tally.shown()}{' and others' * (share > 1)})"
        for parameter in resting:  # not stepped: no momentum, no decay
            parameter.grad = None
        norm = clip_gradients(self.parts, self.stage.clip, where)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        statistics = {name: tally.statistics(name, session.accelerator) for name in sorted(taking_part)}
        for name, sums in statistics.items():
            with torch.no_grad():
                called(self.active[name], name, "after_step", self.step, sums)
        settings = {name: session.weight(name, self.stage) for name in ("text", *taking_part)}
        self.seen |= {name for name, weight in settings.items() if not weight or weight_at(weight, self.step)}
        sizes = {name: counts[name] for name in ("samples", "images", "tokens")}
        return {**losses, "grad_norm": norm, **gradients, **sizes}

    def _resting(self, taking_part: Collection[str]) -> list[nn.Parameter]:
        """Trained parameters of objectives that sit this step out."""
        names = self.active.keys() - set(taking_part)
        parts = [part for part in self.parts if part.name.partition(".")[0] in names]
        return [parameter for part in parts for parameter in part.parameters.values()]

    def _weight(self, name: str) -> float:
        """The weight of a part of the loss in this step."""
        return weight_at(self.session.weight(name, self.stage), self.step)

    def _terms(self, output: StepOutput, counts: Mapping[str, float]) -> dict[str, Tensor]:
        """The parts of the loss: each one's sum over the step's count of its units, times its weight."""
        return {name: self._weight(name) * term.total / max(counts[name], 1.0) for name, term in output.terms.items()}

    def _probe(self, taking_part: Collection[str], due: bool) -> GradientProbe:
        """For the gradients of the parts of the loss; where it is not due, it looks at nothing."""
        return GradientProbe(self.parts if due else (), ["text", *filter(taking_part.__contains__, self.active)])

    def _means(self, tally: Tally, counts: Mapping[str, float]) -> dict[str, float]:
        """Raw means of every part, the weighted total, and the parts' metrics; of a part without a unit, nothing.

        Raises `TrainingError` where one is not finite.
        """
        found = self.session.sum_over_processes(tally.values())
        tally.check_statistics(found, self.session.accelerator.num_processes)
        totals = {name.removeprefix("sum/"): value for name, value in found.items() if name.startswith("sum/")}
        if bad := [name for name, total in totals.items() if not math.isfinite(total)]:
            raise TrainingError(
                f"the loss of '{', '.join(bad)}' is not finite in stage {self.stage.name}, step {self.step + 1}; "
                f"samples: {', '.join(self.session.of_all_processes(tally.culprits(bad))[:8])}. The weights are those "
                "before this step."
            )
        means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        weighted = {name: self._weight(name) * mean for name, mean in means.items()}
        told = self.session.objectives or self.session.weight("text", self.stage) != 1
        shares = {
            name.removeprefix("metric/"): value / found[f"count/{name.removeprefix('metric/')}"]
            for name, value in found.items()
            if name.startswith("metric/") and found[f"count/{name.removeprefix('metric/')}"]
        }
        losses = {"loss": sum(weighted.values()), **{f"loss/{name}": mean for name, mean in means.items()}}
        return losses | ({f"weighted/{name}": value for name, value in weighted.items()} if told else {}) | shares

    @contextlib.contextmanager
    def _memory_savers(self) -> Iterator[None]:
        """Gradient checkpointing and compilation of the blocks, as the recipe's `hardware` asks, undone at the end."""
        hardware = self.session.recipe.hardware
        blocks = [*self.session.lmm.encoder.blocks(), *self.session.lmm.llm.blocks()]
        plain = [(block, block.forward) for block in blocks]
        for block, forward in plain:
            if hardware.compile:
                forward = torch.compile(forward)
            if hardware.gradient_checkpointing:
                forward = functools.partial(_checkpointed, forward)
            block.forward = forward
        try:
            yield
        finally:
            for block, _ in plain:
                block.__dict__.pop("forward", None)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Held-out loss of every part, as `valid/loss/NAME`; the text's as at inference, without any edit."""
        held_out = self.session.held_out(self.stage)
        if held_out is None:
            return {}
        modes = {name: module.training for name, module in self.modules.items()}
        self.session.learner.eval()
        moment = Moment(self.session.recipe.seed, f"{self.stage.name}, validation")
        tally, counts = Tally(), dict[str, float]()
        for work in held_out.steps():
            for batch in work.batches:
                moved = batch.to(self.session.device)
                output: StepOutput = self.learner(moved, moment, self.active)
                if self._alters():
                    output.terms["text"] = self.learner(moved, moment, ()).terms["text"]
                tally.add(output, batch)
            for name, count in work.counts.items():
                counts[name] = counts.get(name, 0.0) + count
        for name, training in modes.items():
            self.modules[name].train(training)
        totals, counts = self.session.sum_over_processes(tally.sums()), self.session.sum_over_processes(counts)
        return {f"valid/loss/{name}": total / counts[name] for name, total in totals.items() if counts[name]}

    def _alters(self) -> bool:
        """Whether an active objective changes what the LLM computes."""
        rules = self.session.learner.rules
        return any(
            type(part).edit_visual_tokens is not VisionObjective.edit_visual_tokens
            or rules[name].call("attention") != "causal"
            for name, part in self.active.items()
        )

    def _names(self) -> dict[str, Tensor]:
        """State-dict name → tensor of what has been trained so far, adapters of this stage included."""
        trained = {name for part in self.parts for name in part.parameters}
        names: dict[str, Tensor] = {}
        for name, parameter in self.session.lmm.named_parameters():
            plain = name.replace(".base_layer", "")
            if name in trained or plain in self.session.touched:
                names[plain] = parameter
        return names

    def _resume(self) -> None:
        """Adapters, optimizer and position of the stage's newest checkpoint, if the run has one."""
        found = self.session.checkpoint
        if found is None or found.state["stage"] != self.stage.name:
            return
        own = dict(self.session.lmm.named_parameters())
        with torch.no_grad():
            for name, tensor in found.tensors["model"].items():
                if ".lora_" in name:
                    own[name].copy_(tensor)
        load_optimizer_state(self.optimizer, self._trained(), found.tensors["optimizer"])
        self.step = int(found.state["step"])
        self.session.checkpoint = None

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for part in self.parts for name, parameter in part.parameters.items()}

    def save(self, finished: bool = False) -> Path:
        """A checkpoint of this step, complete or absent; a finished stage needs no optimizer any more."""
        session = self.session
        folder = checkpoint_folder(session.run.stage_folder(self.stage.name), self.step)
        if session.accelerator.is_main_process:
            model = {name: session.frozen.value(tensor) for name, tensor in self._names().items()}
            optimizer = {} if finished else optimizer_state(self.optimizer, self._trained())
            state = {"stage": self.stage.name, "step": self.step, "finished": finished}
            state["touched"] = sorted(session.touched)
            heads = dict(session.learner.objectives.state_dict())
            save_checkpoint(folder, {"model": model, "objectives": heads, "optimizer": optimizer}, state)
            session.plugins.hook.checkpoint_saved(
                run=session.run, stage=self.stage.name, step=self.step, folder=str(folder)
            )
        session.accelerator.wait_for_everyone()
        return folder

    def _finish(self) -> None:
        """Wrappers taken away, adapters merged, a last checkpoint."""
        session = self.session
        session.accelerator.unwrap_model(self.learner, keep_fp32_wrapper=False)
        session.accelerator.free_memory()
        session.touched |= {_merged_name(name) for name in self._trained()}
        for name, rule in self.stage.train.items():
            if rule.lora:
                part = name.partition(".")[0]
                session.frozen.thaw(part, self.modules[part])
                merge_lora(self.modules[part])
        self.parts = []
        self.save(finished=True)


def _merged_name(name: str) -> str:
    """The weight that a trained parameter ends up in: itself, or the one that its adapter is merged into."""
    return name.partition(".lora_")[0] + ".weight" if ".lora_" in name else name


def added(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss."""
    return torch.stack(list(terms.values())).sum() if len(terms) > 1 else terms["text"]


def timed(steps: Iterable[StepBatches]) -> Iterator[tuple[StepBatches, float]]:
    """Each step's batches, and the seconds that the loop waited for them."""
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        work = next(iterator, None)
        if work is None:
            return
        yield work, time.perf_counter() - started


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Recompute a block in the backward pass instead of keeping its activations."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return recompute(forward, *args, use_reentrant=False, **kwargs)
