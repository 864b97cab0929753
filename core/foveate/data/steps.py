"""A stage's data: one item is one optimizer step, already dealt to this rank and packed into micro-batches."""

import copy
import heapq
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch.utils.data import DataLoader, Dataset

from foveate.data.dataset import SampleError
from foveate.data.mixture import Mixture, Source
from foveate.data.packing import deal, pack
from foveate.data.sample import SampleRules, build_sample, load_pixels, stand_ins
from foveate.data.views import counts_of
from foveate.errors import DataError, FoveateError
from foveate.types import Batch, Sample


@dataclass
class StepBatches:
    """This rank's share of one optimizer step.

    `batches`: as many as on every other rank. `counts`: units of each part of the loss, of `text` supervised tokens.
    `skipped`: why places of the step stayed empty, each told by one rank; `bad` of them are defects, others too long.
    """

    batches: list[Batch] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=lambda: {"text": 0.0})
    samples: int = 0
    images: int = 0
    tokens: int = 0
    skipped: list[str] = field(default_factory=list)
    bad: int = 0

    def pin_memory(self) -> Self:
        """The same in page-locked memory; torch's loader calls it."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class StageData(Dataset[StepBatches | FoveateError]):
    """Optimizer steps by number; `steps` loads them in workers.

    A step takes `batch_size` places of the mixture over all ranks (an epoch's last may be short). Every rank tokenizes
    all of them, so that all agree who computes what, and opens its own pictures. `budget`: tokens of a micro-batch.
    With `on_bad="skip"` at most `max_bad_rate` of the samples may be defective.
    """

    def __init__(
        self, sources: Sequence[Source], rules: SampleRules, *, batch_size: int, seed: int = 0, budget: int = 16384,
        rank: int = 0, world: int = 1, on_bad: Literal["error", "skip"] = "error", max_bad_rate: float = 0.01,
        workers: int = 0, prefetch: int = 2, shuffle: bool = True, epochs: float | None = None,
        max_steps: int | None = None,
    ):  # fmt: skip
        self.mixture, self.rules = Mixture(sources, seed, shuffle), rules
        self.batch_size, self.budget, self.rank, self.world = batch_size, budget, rank, world
        self.on_bad, self.max_bad_rate = on_bad, max_bad_rate
        self.steps_per_epoch = math.ceil(len(self.mixture) / batch_size)
        by_epochs = math.ceil(self.steps_per_epoch * (1 if epochs is None else epochs))
        self.total_steps = max_steps if max_steps and (epochs is None or max_steps < by_epochs) else by_epochs
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or forked workers warn about it
        self._order = list[int]()
        self._loader: DataLoader[Any] = DataLoader(  # of a copy: garbage in a circle would not end its workers in order
            copy.copy(self), batch_size=None, sampler=self._order, num_workers=workers, persistent_workers=workers > 0,
            prefetch_factor=prefetch if workers else None, pin_memory=torch.cuda.is_available(),
            worker_init_fn=_out_of_reach,
        )  # fmt: skip

    def steps(self, start: int = 0) -> Iterator[StepBatches]:
        """The steps from `start` on; nothing before is read. One iteration at a time. Raises `DataError`."""
        self._order[:] = range(start, self.total_steps)
        bad, reasons, planned = 0, list[str](), self.total_steps * self.batch_size / self.world
        error: FoveateError | None = None
        for number, item in enumerate(self._loader, 1):
            if isinstance(item, FoveateError):
                error = _advised(item)  # as it was raised, without the worker's traceback
                break
            seen, bad = number * self.batch_size // self.world, bad + item.bad
            reasons += item.skipped[: 5 - len(reasons)]
            if bad > self.max_bad_rate * min(planned, max(seen, 1000)):  # a rate of fewer says little
                why = f"max_bad_rate is {self.max_bad_rate:g}; `foveate data check` lists all: {'; '.join(reasons)}"
                error = DataError(f"{bad} of the first {seen} samples were skipped as defective: {why}")
                break
            yield item
        if error is not None:
            self._loader._iterator = None  # ends the workers now, not when the traceback is garbage
            raise error

    def __getitem__(self, step: int) -> StepBatches | FoveateError:
        epoch, place = divmod(step, self.steps_per_epoch)
        places = range(place * self.batch_size, min((place + 1) * self.batch_size, len(self.mixture)))
        result, outlines = StepBatches(), list[Sample]()
        try:
            for place in places:
                outlines += self._sound(result, place % self.world == self.rank, self._outline, epoch, place)
            for group in deal([sample.length for sample in outlines], self.world, self.budget)[self.rank]:
                self._fill(result, [outlines[number] for number in group])
        except FoveateError as error:
            return error
        return result

    def largest(self, among: int = 1024) -> list[StepBatches]:
        """This rank's largest micro-batches, one each: with the most tokens, and, if it is another, the most images.

        As a step of the `batch_size` longest (or richest in images) of up to `among` samples, spread over an epoch,
        would make them; as many on every rank. Raises `DataError` as `steps` does.
        """
        try:
            return self._largest(among)
        except FoveateError as error:
            raise _advised(error) from error.__cause__

    def _largest(self, among: int) -> list[StepBatches]:
        skipped, seen, size = StepBatches(), list[Sample](), len(self.mixture)
        for place in {number * size // min(size, among): None for number in range(min(size, among))}:
            seen += self._sound(skipped, False, self._outline, 0, place)
        found, chosen = list[StepBatches](), list[list[int]]()
        sizes = [(sample.length, len(sample.images)) for sample in seen]
        for order in ((0, 1), (1, 0)):
            step = heapq.nlargest(self.batch_size, range(len(seen)), key=lambda at: [sizes[at][key] for key in order])
            if sorted(step) in chosen:
                continue
            chosen.append(sorted(step))
            groups = deal([sizes[at][0] for at in step], self.world, self.budget)[self.rank]
            most = max(groups, key=lambda group: [sum(sizes[step[at]][key] for at in group) for key in order])
            found.append(StepBatches())
            self._fill(found[-1], [seen[step[at]] for at in most])
        return found

    def _fill(self, result: StepBatches, outlines: Sequence[Sample]) -> None:
        """One more micro-batch: pictures opened, packed, counted."""
        samples = list[Sample]()
        for outline in outlines:
            samples += self._sound(result, True, load_pixels, outline, self.rules)
        result.batches.append(pack(samples + stand_ins(samples, self.rules), self.rules.objectives))
        result.samples += len(samples)
        result.images += sum(len(sample.images) for sample in samples)
        result.tokens += sum(sample.length for sample in samples)
        result.counts["text"] += result.batches[-1].target_ids.numel()
        for name, units in counts_of(samples, self.rules.objectives).items():
            result.counts[name] = result.counts.get(name, 0.0) + units

    def _outline(self, epoch: int, place: int) -> Sample:
        number, index = self.mixture.sample_at(epoch, place)
        source = self.mixture.sources[number]
        sample = build_sample(source.dataset[index], self.rules, source.objectives)
        return replace(sample, images=[replace(record, occurrence=place) for record in sample.images])

    def _sound(self, result: StepBatches, told: bool, make: Callable[..., Sample], *arguments: Any) -> list[Sample]:
        """What `make` makes, or nothing where the recipe lets the place of a defective sample stay empty."""
        try:
            return [make(*arguments)]
        except SampleError as error:
            dropped = error.kind == "long" and self.rules.on_long == "drop"
            if not dropped and self.on_bad == "error":
                raise
            result.skipped += [str(error)] * told
            result.bad += told and not dropped
            return []


def _advised(error: FoveateError) -> FoveateError:
    """The error, with what to do about a defective sample."""
    if not isinstance(error, SampleError):
        return error
    advice = "Mend it (`foveate data check RECIPE` lists all), or set on_bad_sample: skip."
    return SampleError(error.kind, error.where, f"{error.problem}. {advice}")


def _out_of_reach(worker: int) -> None:
    """Ctrl-C and a scheduler signal whole groups, or all processes of a job; the step at hand still needs its data.

    So a worker ends with its parent; one that hangs, two minutes after it was asked to.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120))
