"""The numbers of one optimizer step, from all its micro-batches, before they are added up over processes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from foveate.errors import PluginError
from foveate.learner import StepOutput
from foveate.objective import LossTerm
from foveate.types import Batch


@dataclass
class Tally:
    """Sums and metrics of a step's micro-batches, and what tells the origin of a value that is not finite."""

    outputs: list[tuple[StepOutput, list[str]]] = field(default_factory=list)

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Takes the numbers of a micro-batch, without its graph."""
        terms = {name: _plain(term) for name, term in output.terms.items()}
        self.outputs.append((StepOutput(terms, output.text_by_sample), batch.sample_ids))

    def sums(self) -> dict[str, float]:
        """Part → sum of its loss."""
        return {name.removeprefix("sum/"): value for name, value in self.values().items() if name.startswith("sum/")}

    def values(self) -> dict[str, float]:
        """`sum/PART`, `metric/PART/NAME` and `count/PART/NAME`, ready to be added up over processes.

        `statistic/PART/NAME` is 1 where this process has these statistics.
        """
        found: dict[str, float] = {}
        for output, _ in self.outputs:
            for part, term in output.terms.items():
                numbers: dict[str, float | Tensor] = {f"sum/{part}": term.total}
                for name, (total, count) in term.metrics.items():
                    numbers |= {f"metric/{part}/{name}": total, f"count/{part}/{name}": count}
                for name, number in numbers.items():
                    found[name] = found.get(name, 0.0) + float(number)
                found |= {f"statistic/{part}/{name}": 1.0 for name in term.statistics}
        return found

    @staticmethod
    def check_statistics(found: Mapping[str, float], processes: int) -> None:
        """Raises `PluginError` where some of the processes, whose values add up to `found`, lack statistics."""
        for name, having in found.items():
            kind, _, rest = name.partition("/")
            if kind == "statistic" and having != processes:
                part, _, statistic = rest.partition("/")
                raise PluginError(
                    f"objective '{part}': {having:.0f} of {processes} processes report the statistics '{statistic}'. "
                    "Report them in every micro-batch, zero where there is nothing to count."
                )

    def statistics(self, part: str, accelerator: Any) -> dict[str, Tensor]:
        """The statistics of an objective, added up over micro-batches and processes."""
        found: dict[str, Tensor] = {}
        for output, _ in self.outputs:
            for name, value in output.terms[part].statistics.items() if part in output.terms else ():
                found[name] = found[name] + value if name in found else value
        return {name: accelerator.reduce(found[name], "sum") for name in sorted(found)}

    def culprits(self, parts: Collection[str]) -> list[str]:
        """Samples of this process whose loss is not finite; of an objective, all samples of its micro-batch."""
        found: list[str] = []
        for output, samples in self.outputs:
            losses = zip(samples, output.text_by_sample.tolist(), strict=True)
            found += [sample for sample, loss in losses if "text" in parts and not math.isfinite(loss)]
            others = [term for name, term in output.terms.items() if name != "text" and name in parts]
            found += samples if any(not math.isfinite(float(term.total)) for term in others) else []
        return list(dict.fromkeys(found))

    def shown(self) -> str:
        """Some of the samples."""
        samples = [sample for _, ids in self.outputs for sample in ids]
        return ", ".join(samples[:8]) + " …" * (len(samples) > 8)


def _plain(term: LossTerm) -> LossTerm:
    def value(number: Tensor | float) -> Tensor | float:
        return number.detach() if isinstance(number, Tensor) else number

    metrics = {name: (value(total), count) for name, (total, count) in term.metrics.items()}
    return LossTerm(term.total.detach(), metrics, {name: sums.detach() for name, sums in term.statistics.items()})
