"""Wrong objectives, each beside its corrected twin: what the conformance kit must tell apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import (
    Edit,
    EditInputs,
    LossTerm,
    ObjectiveContext,
    ObjectiveOptions,
    Outputs,
    Targets,
    TeacherInputs,
    VisionObjective,
)
from foveate.types import ImageRecord


class Base(VisionObjective):
    """Predicts noise of each row from its state."""

    class Options(ObjectiveOptions):
        """None of its own."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 3)

    def errors(self, outputs: Outputs) -> Tensor:
        """`[R]`."""
        return (self.head(outputs.states()) - outputs.randn_rows(3, name="noise")).square().sum(-1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(self.errors(outputs).sum())


# 1. A mean instead of a sum.


class Mean(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(self.errors(outputs).mean())


class MeanCorrected(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(self.errors(outputs).sum())


# 2. A global random generator.


class GlobalNoise(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        made: Tensor = self.head(outputs.states())
        return (made - torch.randn_like(made)).square().sum(-1)


class GlobalNoiseCorrected(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        made: Tensor = self.head(outputs.states())
        return (made - outputs.randn_rows(3, name="x")).square().sum(-1)


# 3. A teacher registered as a sub-module.


class WithTeacher(Base):
    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        weight = teacher.weight
        made = [teacher(weight.new_tensor(record.content).repeat(2)) for record in inputs.records]
        return [{"values": values} for values in made]

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        parts = zip(outputs.split(self.head(outputs.states())), targets.stack("values"), strict=True)
        return LossTerm(torch.cat([rows - wanted for rows, wanted in parts]).square().sum())


class OwnTeacher(WithTeacher):
    def build_teacher(self) -> nn.Module:
        self.teacher = nn.Linear(8, 3)
        return self.teacher


class OwnTeacherCorrected(WithTeacher):
    def build_teacher(self) -> nn.Module:
        return nn.Linear(8, 3)


# 4. A wrong count: 1 an image, while the sum runs over its rows.


class WrongCount(Base):
    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return 1


class WrongCountCorrected(Base):
    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return record.rows()


# 5. A state that leaks across samples: through the row, and through the module.


class CentredOverRow(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        states = outputs.states()
        return self.head(states - states.mean(0)).square().sum(-1)


class CentredOverRowCorrected(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        return torch.cat([self.head(rows - rows.mean(0)).square().sum(-1) for rows in outputs.split(outputs.states())])


class Remembers(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.previous: Tensor | None = None

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        mean = outputs.states().detach().mean(0)
        centre = mean if self.previous is None else 0.9 * self.previous + 0.1 * mean
        self.previous = centre
        return LossTerm(self.head(outputs.states() - centre).square().sum())


class RemembersCorrected(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.register_buffer("centre", torch.zeros(context.llm_width))

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(self.head(outputs.states() - self.centre).square().sum())

    @torch.no_grad()
    def after_step(self, step: int, statistics: Any) -> None:
        self.centre.mul_(0.9).add_(self.head.weight.sum(0), alpha=0.1)  # type: ignore[operator, union-attr]


# 6. An in-place edit.


class Masking(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.mask = nn.Parameter(torch.randn(context.llm_width))

    @staticmethod
    def chosen(inputs: EditInputs) -> Tensor:
        """`[R]` bool."""
        sizes = [image.rows.stop - image.rows.start for image in inputs.images]
        return torch.cat([torch.rand(n, generator=inputs.generator(i, "mask")) < 0.5 for i, n in enumerate(sizes)])


class InPlaceEdit(Masking):
    def edit_visual_tokens(self, inputs: EditInputs) -> Edit:
        edited = self.chosen(inputs)
        inputs.tokens[edited] = self.mask
        return Edit(inputs.tokens, edited)


class InPlaceEditCorrected(Masking):
    def edit_visual_tokens(self, inputs: EditInputs) -> Edit:
        edited = self.chosen(inputs)
        return Edit(torch.where(edited[:, None], self.mask, inputs.tokens), edited)


# 7. A head that gets no gradient.


class NoGradient(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.first = nn.Linear(context.llm_width, context.llm_width)

    def errors(self, outputs: Outputs) -> Tensor:
        with torch.no_grad():
            states = self.first(outputs.states())
        return self.head(states + outputs.states()).square().sum(-1)


class NoGradientCorrected(NoGradient):
    def errors(self, outputs: Outputs) -> Tensor:
        return self.head(self.first(outputs.states()) + outputs.states()).square().sum(-1)


# 8. A loss that is NaN on the dummy.


class NanOnDummy(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        rows = [image.rows.stop - image.rows.start for image in outputs.images]
        real = [0.0 if image.record.dummy else 1.0 for image in outputs.images]
        weight = torch.cat([torch.full((n,), share) for n, share in zip(rows, real, strict=True)])
        return LossTerm((weight * self.errors(outputs)).sum() / weight.mean())


class NanOnDummyCorrected(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(self.errors(outputs).sum())


WRONG: dict[str, tuple[type[VisionObjective], type[VisionObjective], str, tuple[str, ...]]] = {
    "a mean instead of a sum": (Mean, MeanCorrected, "sums", ("It is the mean over units", "reduction='sum'")),
    "a global random generator": (
        GlobalNoise, GlobalNoiseCorrected, "noise",
        ("loss draws from the global generator of torch", "outputs.randn_rows"),
    ),
    "a teacher registered as a sub-module": (
        OwnTeacher, OwnTeacherCorrected, "teacher",
        ("keeps its teacher as a sub-module", "Return the teacher from build_teacher"),
    ),
    "a wrong count": (
        WrongCount, WrongCountCorrected, "count",
        ("run over more units than `count` says", "1 times as many units on nine times", "its rows for a loss"),
    ),
    "a state that leaks across samples of a row": (
        CentredOverRow, CentredOverRowCorrected, "sums",
        ("samples influence each other", "no statistic run over the rows"),
    ),
    "a state that leaks across rows": (
        Remembers, RemembersCorrected, "memory",
        ("after another batch", "It writes the attributes previous", "after_step"),
    ),
    "an in-place edit": (
        InPlaceEdit, InPlaceEditCorrected, "edits",
        ("writes into inputs.tokens", "overwritten in place", "torch.where"),
    ),
    "a head that gets no gradient": (
        NoGradient, NoGradientCorrected, "gradient flow", ("first.weight, first.bias", "no_grad"),
    ),
    "a loss that is NaN on the dummy": (
        NanOnDummy, NanOnDummyCorrected, "text-only batch",
        ("its loss is nan on the dummy picture", "record.dummy"),
    ),
}  # fmt: skip
"""What is wrong → the wrong class, its twin, the check that finds it, and what the message says."""
