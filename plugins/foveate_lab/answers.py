"""The metric `answers`: exact answers by kind of question, beside three baselines that see nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate import Metric
from foveate.metrics import Answer, Evaluation
from foveate_lab.questions import majority

_Z = 1.96


class AnswersMetric(Metric):
    """Share of questions that greedy decoding would answer with exactly the reference, its end included.

    Questions are grouped by `kind` of their `meta`. Baselines: the same model with the pictures of other samples
    (`blind`), the most frequent of the reference values (`majority`), a uniform guess (`chance`, where `meta` tells).
    """

    blind = True

    class Options(Metric.Options):
        """No options."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._by_kind: dict[str, list[Answer]] = {}

    def update(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._by_kind.setdefault(str(answer.meta.get("kind", "all")), []).append(answer)

    def summary(self) -> Evaluation:
        rows: list[tuple[str | int | float | None, ...]] = []
        values: dict[str, float] = {}
        for kind, answers in sorted(self._by_kind.items()):
            count = len(answers)
            accuracy = sum(answer.exact for answer in answers) / count
            blind = sum(answer.blind for answer in answers) / count
            said = [str(answer.meta["answer"]) for answer in answers if "answer" in answer.meta]
            most = majority(said)[1] if said else None
            chances = [float(answer.meta["chance"]) for answer in answers if "chance" in answer.meta]
            chance = sum(chances) / len(chances) if chances else None
            margin = _Z * math.sqrt(max(accuracy * (1 - accuracy), 0.25 / count) / count)
            rows.append((kind, count, accuracy, f"±{margin:.3f}", blind, most, chance))
            values |= {f"{kind}/accuracy": accuracy, f"{kind}/blind": blind}
            values |= {} if most is None else {f"{kind}/majority": most}
            values |= {} if chance is None else {f"{kind}/chance": chance}
        columns = ("question", "n", "accuracy", "95 %", "blind", "majority", "chance")
        notes = ("accuracy: the whole answer is right; blind: the same model, shown another sample's picture",)
        return Evaluation("held-out questions", columns, rows, values, notes)
