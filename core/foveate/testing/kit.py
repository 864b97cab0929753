"""What checks share: the objective on its tiny model, before and after a short training, and sums of its loss."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.forward_pass import ForwardPass
from foveate.learner import Learner
from foveate.model.lmm import LMM
from foveate.model.taps import END, layer_index
from foveate.objective import LossTerm, Moment
from foveate.plugins import Plugins
from foveate.targets import TeacherRoom, called
from foveate.testing.models import Bench, Chosen, build_objective, tiny_lmm
from foveate.testing.report import Failed
from foveate.types import Batch, Sample

MOMENT = Moment(7, "conformance", 3)
"""When the checks compute a loss."""

TOLERANCE = 1e-9
"""Relative, in float64."""

LEAST_STEPS, MOST_STEPS, RATE = 3, 8, 1e-2
"""Of the short training, and its learning rate. A zero-initialised head passes gradients on from step two or three."""


@dataclass
class Measured:
    """The objective's part of a loss on one row: its sum, its metrics as (sum, count), gradients by parameter."""

    total: float
    metrics: dict[str, tuple[float, float]]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass
class Kit:
    """One objective under test, and what its author waived."""

    chosen: Chosen
    gradient_to: tuple[str, ...]
    count_check: bool
    side: int
    seed: int
    plugins: Plugins | None = None
    steps: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    """Of the short training: its steps, and each parameter's largest gradient in any of them."""
    _start: Bench | Exception | None = None

    @property
    def name(self) -> str:
        """The objective's name on the bench."""
        return self.chosen.name

    @functools.cached_property
    def lmm(self) -> LMM:
        """The tiny model at the start."""
        return tiny_lmm(self.side, self.seed)

    @property
    def start(self) -> Bench:
        """The objective on the tiny model, its weights as they are at the start. Made once, also where that fails."""
        if self._start is None:
            try:
                self._start = Bench(self.chosen, self.lmm, self.seed)
            except Exception as error:
                self._start = error
        if isinstance(self._start, Exception):
            raise self._start
        return self._start

    @functools.cached_property
    def trained(self) -> Bench:
        """The same as `start` after a few optimizer steps of head, projector and LLM on the mixed row.

        More than `LEAST_STEPS` are taken, up to `MOST_STEPS`, while something has had no gradient yet.
        """
        bench = Bench(self.chosen, copy.deepcopy(self.lmm), self.seed, teachers_of=self.start)
        bench.learner.train()
        bench.lmm.encoder.eval()
        trained = {name: p for name, p in bench.learner.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
        batch = bench.mixed
        units = max(1.0, sum(bench.rule.count(record) for record in batch.images if self.name in record.objectives))
        while self.steps < LEAST_STEPS or (self.steps < MOST_STEPS and self.without_gradient(bench)):
            term = bench.learner(batch, Moment(self.seed, "training", self.steps)).terms[self.name]
            if term.total.requires_grad:
                (term.total / units).backward()
            for name, parameter in trained.items():
                size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
                self.largest[name] = max(size if math.isfinite(size) else math.inf, self.largest.get(name, 0.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                called(bench.objective, self.name, "after_step", self.steps, term.statistics)
            self.steps += 1
        return bench

    def without_gradient(self, bench: Bench) -> list[str]:
        """What should have had a gradient and has had none: parameters of head and projector, blocks of the LLM."""
        head = f"objectives.{self.name}."
        prefixes = {"head": head, "projector": "lmm.projector."}
        wanted = tuple(prefix for part, prefix in prefixes.items() if part in self.gradient_to)
        found = [name for name, size in self.largest.items() if size == 0 and name.startswith(wanted)] if wanted else []
        if "llm" in self.gradient_to:
            names = {id(parameter): name for name, parameter in bench.learner.named_parameters()}
            for number, block in enumerate(read_blocks(bench), 1):
                if not any(self.largest.get(names[id(parameter)]) for parameter in block.parameters()):
                    found.append(f"llm block {number}")
        return [name.removeprefix(head).removeprefix("lmm.") for name in found]

    def copy_of_trained(self) -> Learner:
        """The trained learner with an objective of its own, made anew from its state; the rest is shared."""
        bench = self.trained
        objective = build_objective(self.chosen, bench.lmm, self.name, self.seed + 1).double()
        objective.load_state_dict(bench.objective.state_dict())
        return Learner(bench.lmm, {self.name: objective}, bench.teachers)

    def in_float32(self) -> Learner:
        """The trained learner in float32, teacher included; nothing is shared."""
        bench, lmm = self.trained, copy.deepcopy(self.trained.lmm).float()
        objective = build_objective(self.chosen, lmm, self.name, self.seed + 1)
        objective.load_state_dict(bench.objective.state_dict())
        objectives = {self.name: objective.float()}
        teachers = TeacherRoom(objectives)
        teachers._teachers = {key: copy.deepcopy(found) for key, found in bench.teachers._teachers.items()}
        for found in teachers._teachers.values():
            _ = found and found.float()
        return Learner(lmm, objectives, teachers)

    def term(self, batch: Batch, learner: Learner | None = None) -> LossTerm:
        """The objective's term of a row, after the short training if no learner is given."""
        return (learner or self.trained.learner)(batch, MOMENT).terms[self.name]

    @torch.no_grad()
    def total(self, samples: Sequence[Sample] | Batch, learner: Learner | None = None) -> float:
        """The sum of the loss over some samples in one row."""
        batch = samples if isinstance(samples, Batch) else self.trained.pack(samples)
        return float(self.term(batch, learner).total)

    def measure(self, samples: Sequence[Sample]) -> Measured:
        """Sum, metrics and gradients of some samples in one row, of the trained bench."""
        learner = self.trained.learner
        learner.zero_grad(set_to_none=True)
        term = self.term(self.trained.pack(samples))
        if term.total.requires_grad:
            term.total.backward()
        gradients = {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}
        learner.zero_grad(set_to_none=True)
        metrics = {name: (number(value), number(count)) for name, (value, count) in term.metrics.items()}
        return Measured(float(term.total.detach()), metrics, gradients)


def forward(learner: Learner, batch: Batch, name: str) -> ForwardPass:
    """One run of the model with one objective."""
    objective: Any = learner.objectives[name]
    return ForwardPass(learner.lmm, batch, {name: objective}, learner.rules, MOMENT, None, learner.teachers)


def loss_of(run: ForwardPass, name: str) -> LossTerm:
    """The loss term of an objective in such a run, also of a dummy picture."""
    edit = run.edits.get(name)
    arguments = run.outputs(name), run.targets(name), edit.state if edit else None
    term: LossTerm = called(run.objectives[name], name, "loss", *arguments)
    return term


def number(value: Tensor | float) -> float:
    """A scalar of a loss term as a float."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def seeded(seed: int) -> None:
    """Seeds every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def global_states() -> Mapping[str, Any]:
    """The states of the global generators, comparable with ==."""
    _, keys, *place = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (np.asarray(keys).tobytes(), *place),
        "random": random.getstate(),
    }


@contextmanager
def own_generators() -> Iterator[None]:
    """Inside, global generators may be seeded and used; afterwards they are what they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def apart(first: float, second: float, scale: float = 0.0) -> float:
    """How far two numbers are apart, relative to the larger one, or to `scale` where that is larger still."""
    if first == second:
        return 0.0
    distance = abs(first - second) / max(abs(first), abs(second), scale)
    return distance if distance == distance else float("inf")


def rounding(distance: float) -> str:
    """A hint for differences of the size of float32's rounding."""
    small = TOLERANCE < distance < 1e-5
    return " So small a difference points to a cast to float32: keep the dtype of what you get." if small else ""


def fail_unless_close(distance: float, found: str, why: str, do: str) -> None:
    """Raises `Failed` for a relative distance above the tolerance."""
    if not distance <= TOLERANCE:
        raise Failed(found, why, do + rounding(distance))


def read_blocks(bench: Bench) -> list[nn.Module]:
    """The LLM's blocks up to the deepest layer that the objective reads."""
    blocks = bench.lmm.llm.blocks()
    layers = {layer_index(layer, len(blocks)) for layer in bench.rule.reads.llm}
    return blocks if END in layers else blocks[: max(layers, default=0)]
