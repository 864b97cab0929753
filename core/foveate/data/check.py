"""Checking a corpus: every defect in one pass, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from foveate.data.dataset import SampleError
from foveate.data.images import open_image
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules, build_sample, defects

_CHUNK = 256


@dataclass(frozen=True)
class Defect:
    """One defect: the source's name, the sample's index there and its id, the kind, and the problem in words."""

    source: str
    index: int
    sample_id: str
    kind: str
    problem: str


@dataclass
class Report:
    """A corpus: how many samples, every defect, and what was measured on what is sound.

    `measures`: `tokens` and `supervised` (tokens) of each sample, `width` and `height` of each picture.
    """

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
        found = {name: [len(values), *np.percentile(values, [0, 50, 95, 100])] for name, values in self.measures.items()}
        return {name: dict(zip(("count", "min", "median", "p95", "max"), row, strict=True)) for name, row in found.items()}

    def measure(self, **values: Iterable[int]) -> None:
        """Add values to measures."""
        for name, more in values.items():
            self.measures.setdefault(name, []).extend(more)


class _Chunks(Dataset[Report]):
    """Reports on 256 samples each, at most `limit` samples of a source, spread over all of it."""

    def __init__(self, sources: Sequence[Source], rules: SampleRules, limit: int | None):
        self.rules, self.chunks = rules, list[tuple[Source, list[int]]]()
        for source in sources:
            size = len(source.dataset)
            picked = np.linspace(0, size, min(size, limit or size), endpoint=False).astype(int).tolist()
            self.chunks += [(source, picked[at : at + _CHUNK]) for at in range(0, len(picked), _CHUNK)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> Report:
        (source, picked), report = self.chunks[chunk], Report()
        for index in picked:
            report.samples += 1
            self._inspect(source, index, report)
        return report

    def _inspect(self, source: Source, index: int, report: Report) -> None:
        sample_id, found = f"{source.name}[{index}]", list[SampleError]()
        try:
            conversation = source.dataset[index]
            sample_id, found = conversation.id, list(defects(conversation))
            for ref in conversation.images:
                try:
                    width, height = open_image(ref, sample_id).size
                    report.measure(width=[width], height=[height])
                except SampleError as error:
                    found.append(error)
            if all(error.kind == "image" for error in found):
                sample = build_sample(conversation, self.rules)
                report.measure(tokens=[sample.length], supervised=[sample.supervised])
        except SampleError as error:
            found.append(error)
        report.defects += [Defect(source.name, index, sample_id, error.kind, error.problem) for error in found]


def check(
    sources: Sequence[Source], rules: SampleRules, workers: int = 0, limit: int | None = None,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Report:  # fmt: skip
    """Read samples and open their pictures, all of each source or `limit` spread over it; `progress(samples done)`.

    Never raises for a defective sample: the report names all of them.
    """
    report = Report()
    for part in DataLoader(_Chunks(sources, rules, limit), batch_size=None, num_workers=workers):
        report.samples += part.samples
        report.defects += part.defects
        report.measure(**part.measures)
        progress(report.samples)
    return report
