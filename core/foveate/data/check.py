"""Checking a corpus: every defect in one pass, before anything is trained."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from foveate.data.dataset import SampleError
from foveate.data.images import open_image
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules, build_sample, defects


@dataclass(frozen=True)
class Defect:
    """One defect: the source's name, the sample's index there and its id, the kind, and the problem in words."""

    source: str
    index: int
    sample_id: str
    kind: str
    problem: str

    def __str__(self) -> str:
        return f"{self.source}[{self.index}], sample {self.sample_id}: {self.kind}: {self.problem}"


@dataclass
class Report:
    """Samples, defects, and `measures`: `tokens` and `supervised` ones of samples, `width` and `height` of pictures."""

    samples: int = 0
    defects: list[Defect] = field(default_factory=list)
    measures: dict[str, list[int]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Defects of each kind, the most frequent first."""
        return dict(Counter(defect.kind for defect in self.defects).most_common())

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Count, minimum, median, 95th percentile and maximum of each measure."""
        names = ("count", "min", "median", "p95", "max")
        rows = {name: [len(values), *np.percentile(values, [0, 50, 95, 100])] for name, values in self.measures.items()}
        return {name: dict(zip(names, row, strict=True)) for name, row in rows.items()}


class _Inspections(Dataset[tuple[list[Defect], list[tuple[str, int]]]]):
    """Defects and measures of one sample each, of at most `limit` samples of a source, spread over all of it."""

    def __init__(self, sources: Sequence[Source], rules: SampleRules, limit: int | None):
        self.rules, sizes = rules, [(source, len(source.dataset)) for source in sources]
        wanted = [(source, size, size if limit is None else min(size, limit)) for source, size in sizes]
        self.picked = [(source, k * size // count) for source, size, count in wanted for k in range(count)]

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, number: int) -> tuple[list[Defect], list[tuple[str, int]]]:
        source, index = self.picked[number]
        sample_id, measures, found = "", list[tuple[str, int]](), list[SampleError]()
        try:
            conversation = source.dataset[index]
            sample_id, found = conversation.id, list(defects(conversation))
            for ref in conversation.images:
                try:
                    measures += zip(("width", "height"), open_image(ref, sample_id).size, strict=True)
                except SampleError as error:
                    found.append(error)
            if all(error.kind == "image" for error in found):
                sample = build_sample(conversation, self.rules, source.objectives)
                measures += [("tokens", sample.length), ("supervised", sample.supervised)]
        except SampleError as error:
            found.append(error)
        return [Defect(source.name, index, sample_id or e.where, e.kind, e.problem) for e in found], measures


def check(
    sources: Sequence[Source], rules: SampleRules, workers: int = 0,
    progress: Callable[[int], Any] = lambda samples: None, limit: int | None = None,
) -> Report:  # fmt: skip
    """Read all samples, or `limit` spread over each source, and open their pictures; `progress` hears how many."""
    report = Report()
    inspections = _Inspections(sources, rules, limit)
    for part in DataLoader(inspections, batch_size=256, collate_fn=list, num_workers=workers):
        for found, measures in part:
            report.samples += 1
            report.defects += found
            for name, value in measures:
                report.measures.setdefault(name, []).append(value)
        progress(report.samples)
    return report
