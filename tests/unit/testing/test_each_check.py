"""Each check of the conformance kit finds the mistake that it is for, and says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from foveate import (
    Edit,
    EditInputs,
    ImageRows,
    LossTerm,
    ObjectiveContext,
    ObjectiveOptions,
    Outputs,
    Reads,
    Targets,
    TeacherInputs,
    VisionObjective,
)
from foveate.testing import ConformanceError, check_objective
from foveate.types import ImageRecord
from tests.unit.testing.sound_objectives import ValidRows
from tests.unit.testing.wrong_objectives import Base, InPlaceEditCorrected, WithTeacher


class Undescribed(Base):
    class Options(ObjectiveOptions):
        depth: int = 2


class AnyKey(Base):
    class Options(ObjectiveOptions):
        model_config = ConfigDict(extra="ignore")


class FrozenTable(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.table = nn.Parameter(torch.zeros(3), requires_grad=False)


class PlainList(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.layers = [nn.Linear(3, 3)]


class LooksAtValues(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head.weight.data /= float(self.head.weight.norm())


class NumpyStart(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.start = nn.Parameter(torch.tensor(np.random.default_rng().normal(size=3)))


class NoPickle(Base):
    class Options(ObjectiveOptions):
        call: Any = Field(lambda: 1, description="No recipe can say this.", exclude=True)


class PaintsOver(Base):
    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        image.paste((0, 0, 0), (0, 0, 2, 2))
        return {}


class RandomCrop(Base):
    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        return {"corner": torch.rand(2)}


class Arrays(Base):
    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        return {"array": np.zeros(2)}  # type: ignore[dict-item]


class Taught(WithTeacher):
    def build_teacher(self) -> nn.Module:
        return nn.Linear(8, 3)


class Sampling(Taught):
    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        return [{"values": torch.randn(3, dtype=torch.float64)} for _ in inputs.records]


class BatchNormalised(Taught):
    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        made = torch.stack([entry["values"] for entry in super().encode_target(teacher, inputs)])
        return [{"values": values} for values in made - made.mean(0)]


class OwnHeadsTargets(Taught):
    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        return [{"values": self.head.weight[:, 0]} for _ in inputs.records]


class NeverEnough(Taught):
    @classmethod
    def needs_fit(cls, options: Any) -> bool:
        return True

    def fit_teacher(self, teacher: Any, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        return {"batches": float(sum(1 for _ in batches))}


class TouchesTargets(Taught):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        term = super().loss(outputs, targets, state)
        for record in targets:
            record["values"].zero_()
        return term


class FloatMask(InPlaceEditCorrected):
    def edit_visual_tokens(self, inputs: EditInputs) -> Edit:
        edit = super().edit_visual_tokens(inputs)
        return Edit(edit.tokens, edit.edited.double())


class WritesData(InPlaceEditCorrected):
    def edit_visual_tokens(self, inputs: EditInputs) -> Edit:
        edited = self.chosen(inputs)
        inputs.tokens.data[edited] = self.mask.data
        return Edit(inputs.tokens, edited)


class OneTooFew(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.query = nn.Parameter(torch.zeros(1, context.llm_width))

    @classmethod
    def extra_tokens(cls, options: Any, record: ImageRecord) -> int:
        return 2

    def embed_extra_tokens(self, images: Sequence[ImageRows]) -> Tensor:
        return self.query.repeat(len(images), 1)


class UnknownWish(Base):
    @classmethod
    def attention(cls, options: Any) -> Any:
        return "bidirectional"


class SeesAhead(Base):
    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(shift=1)

    @classmethod
    def attention(cls, options: Any) -> Any:
        return "image_bidirectional"


class DividesByPadding(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        padded = torch.stack([1 - valid.double().mean() for valid in outputs.split(outputs.valid)])
        return super().errors(outputs).sum() / padded


class SkipsDummy(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        if all(image.record.dummy for image in outputs.images):
            return LossTerm(torch.zeros((), dtype=torch.float64))
        return super().loss(outputs, targets, state)


class Dropping(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        return nn.functional.dropout(super().errors(outputs), 0.5, self.training)


class OperatingSystem(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        return super().errors(outputs) * float(np.random.default_rng().uniform(1, 2))


class CountsCalls(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.register_buffer("calls", torch.zeros(()))

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        self.calls += 1
        return super().loss(outputs, targets, state)


class OneStream(Base):
    """One generator for all rows, so an image's noise depends on the images before it."""

    def errors(self, outputs: Outputs) -> Tensor:
        states = outputs.states()
        noise = torch.randn(len(states), 3, generator=outputs.generator(0, "x"), dtype=states.dtype)
        return (self.head(states) - noise).square().sum(-1)


class MeanMetric(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        errors = self.errors(outputs)
        return LossTerm(errors.sum(), {"error": (errors.mean(), 1)})


class NamesByBatch(Base):
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        errors = self.errors(outputs)
        return LossTerm(errors.sum(), {"padded": (1.0, 1.0)} if not outputs.valid.all() else {})


class HalfPrecise(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        return super().errors(outputs).float() + outputs.per_image_mean(outputs.states()).float().sum() * 0

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(self.errors(outputs).sum())


class Detaches(Base):
    """Right in its value, not in its gradient: each image's share is scaled by a value of the row."""

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        total = self.errors(outputs).sum()
        factor = torch.tensor(float(len(outputs.images)))
        return LossTerm(total * factor - (total * (factor - 1)).detach())


class MeanOverRows(Base):
    """One term an image, and the default count."""

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        return LossTerm(outputs.per_image_mean(self.errors(outputs)).sum())


class ShiftedTokens(Base):
    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(shift=1)

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return record.tokens


class CountsNothing(Base):
    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return 0


class CountsByName(Base):
    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return len(record.sample_id)


class CountsPadding(ValidRows):
    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return record.rows()


class Forgets(Base):
    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def errors(self, outputs: Outputs) -> Tensor:
        return super().errors(outputs) * self.scale

    def after_step(self, step: int, statistics: Any) -> None:
        self.scale += 1


class TooSmall(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        return super().errors(outputs) / (outputs.states() * 0 + 1e-60).sum(-1) * 1e-60


class NoPictures(Base):
    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> Any:
        return [("map", Image.new("L", (2, 2)))]


class Raises(Base):
    def errors(self, outputs: Outputs) -> Tensor:
        return self.head(outputs.states(0.5))


MISTAKES: tuple[tuple[type[VisionObjective], str, str], ...] = (
    (Undescribed, "options", "no description: depth"),
    (AnyKey, "options", "the unknown key 'no_such_option' is accepted"),
    (FrozenTable, "construction", "requires_grad=False: table"),
    (PlainList, "construction", "plain containers: layers"),
    (LooksAtValues, "construction", "fails on the meta device"),
    (NumpyStart, "construction", "built twice with one seed, other values: start"),
    (NoPickle, "pickling", "pickle"),
    (PaintsOver, "class methods", "changes the picture in place"),
    (RandomCrop, "class methods", "two different views"),
    (Arrays, "class methods", "Return a dict of names and CPU tensors"),
    (Sampling, "targets", "two different targets for one picture: 'values'"),
    (BatchNormalised, "targets", "depends on the pictures beside it"),
    (OwnHeadsTargets, "frozen teacher", "the targets are others"),
    (NeverEnough, "class methods", "Batches never end"),
    (TouchesTargets, "other objectives", "changes in place what others read too: target 'values'"),
    (FloatMask, "edits", "torch.float64 (needed: [176] torch.bool)"),
    (WritesData, "edits", "overwritten in place"),
    (OneTooFew, "extra tokens", "[11, 32] (needed: [22, 32]"),
    (UnknownWish, "attention", "wishes 'bidirectional'"),
    (SeesAhead, "attention", "wishes image_bidirectional and reads the state before"),
    (DividesByPadding, "kinds of samples", "'one image': loss inf"),
    (SkipsDummy, "text-only batch", "get no gradient: objectives.skipsdummy.head.weight"),
    (Dropping, "noise", "dropout in a head"),
    (OperatingSystem, "noise", "the loss of one batch at one moment"),
    (CountsCalls, "memory", "the buffers calls"),
    (OneStream, "sums", "the noise of an image depends on the row"),
    (MeanMetric, "sums", "metric 'error': its sum is"),
    (NamesByBatch, "sums", "names of metrics depend on the batch"),
    (HalfPrecise, "sums", "cast to float32"),
    (Detaches, "sums", "the gradient of"),
    (MeanOverRows, "count", "over fewer units than `count` says"),
    (ShiftedTokens, "count", "which has 15 rows"),
    (CountsNothing, "count", "count is 0 for the images of"),
    (CountsByName, "count", "under another sample id"),
    (CountsPadding, "count", "metric 'error' has the sum of the loss and between 0.5 and 1 times its count"),
    (Forgets, "checkpoint", "after loading"),
    (TooSmall, "autocast", "gradients that are not finite"),
    (NoPictures, "pictures", "visualize returns"),
    (Raises, "kinds of samples", "reads the LLM's layer 0.5, which its `reads` lacks"),
)
"""The class, the check that finds it, and a piece of what is said."""


@pytest.mark.parametrize(("cls", "check", "fragment"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mistake_is_found_and_explained(cls: type[VisionObjective], check: str, fragment: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_objective(cls)
    found = caught.value.report.of(check)
    assert found in caught.value.report.failures
    assert fragment in f"{found.told} {found.do}", found


def test_an_error_of_the_objective_is_placed() -> None:
    class Breaks(Base):
        def errors(self, outputs: Outputs) -> Tensor:
            raise KeyError("missing")

    with pytest.raises(ConformanceError) as caught:
        check_objective(Breaks)
    [failure] = caught.value.report.failures
    assert "Breaks.loss: KeyError: 'missing'" in failure.told
    assert "test_each_check.py, in errors" in failure.do
    assert caught.value.report.of("pickling").status == "skipped"


def test_the_count_can_be_waived() -> None:
    report = check_objective(MeanOverRows, count_check=False)
    assert (report.of("count").status, report.of("count").told) == ("waived", "count_check=False")


def test_several_mistakes_are_told_at_once() -> None:
    class Both(Undescribed, FrozenTable, NoPictures):
        pass

    with pytest.raises(ConformanceError) as caught:
        check_objective(Both)
    assert [failure.check for failure in caught.value.report.failures] == ["options", "construction", "pictures"]
