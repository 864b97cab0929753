"""Sound objectives of unusual kinds: the conformance kit must raise no false alarm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

import foveate
from foveate import (
    ImageRows,
    LossTerm,
    ObjectiveContext,
    ObjectiveOptions,
    Outputs,
    Picture,
    Reads,
    Targets,
    Teacher,
    TeacherChoice,
    TeacherInputs,
    TeacherSpec,
    VisionObjective,
)
from foveate.types import ImageRecord, ImageRole
from tests.unit.testing.wrong_objectives import Base


class ZeroInitialised(Base):
    """As ROSS: modulation and the last layer start at zero, so the first steps pass no gradient on."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.shift, self.condition = nn.Linear(8, 8), nn.Linear(context.llm_width, 8)
        self.head = nn.Linear(8, 3)
        for layer in (self.shift, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def errors(self, outputs: Outputs) -> Tensor:
        noise = outputs.randn_rows(8, name="noise")
        made: Tensor = self.head(noise + self.shift(F.silu(self.condition(outputs.states()))))
        return (made - noise[:, :3]).square().mean(-1)


class NegativeCosine(Base):
    """As VIRAL: a loss without a fixed sign, towards the encoder's states."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, context.encoder.width)

    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(llm=(0.5,), encoder=(-1,))

    def errors(self, outputs: Outputs) -> Tensor:
        wanted = outputs.on_visual_grid(outputs.encoder_states(-1), outputs.encoder_grid)
        return -F.cosine_similarity(self.head(outputs.states(0.5)), wanted, dim=-1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        errors = self.errors(outputs)
        return LossTerm(errors.sum(), {"cosine": (-errors.detach().sum(), len(errors))})

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        return [Picture("similarity", Image.new("L", (4, 4))) for _ in outputs.images]


class OneTermAnImage(Base):
    """The loss is about the mean of an image's states."""

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return 1

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        pooled = outputs.per_image_mean(outputs.states())
        errors = (self.head(pooled) - outputs.randn(3, name="noise")).square().sum(-1)
        return LossTerm(errors.sum(), {"error": (errors.sum(), len(errors))})


class ValidRows(Base):
    """Leaves padding out, of sum and count."""

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        (rows, columns), (left, top, right, bottom) = record.grid, record.content
        down = sum(top <= (row + 0.5) / rows <= bottom for row in range(rows))
        return down * sum(left <= (column + 0.5) / columns <= right for column in range(columns))

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        errors = self.errors(outputs)[outputs.valid]
        return LossTerm(errors.sum(), {"error": (errors.sum(), len(errors))})


class Attentive(Base):
    """A head that lets the rows of an image see each other."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.attention_ = nn.MultiheadAttention(context.llm_width, 2, batch_first=True)

    def errors(self, outputs: Outputs) -> Tensor:
        mixed = [
            self.attention_(*[rows[None]] * 3, need_weights=False)[0][0] for rows in outputs.split(outputs.states())
        ]
        return (self.head(torch.cat(mixed)) - outputs.randn_rows(3, name="noise")).square().sum(-1)


class Generative(VisionObjective):
    """Extra tokens foretell a target picture that the model does not see."""

    role: ClassVar[ImageRole] = "target"

    class Options(ObjectiveOptions):
        """None of its own."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.queries = nn.Parameter(torch.randn(2, context.llm_width))
        self.head = nn.Linear(context.llm_width, 3)

    @classmethod
    def extra_tokens(cls, options: Any, record: ImageRecord) -> int:
        return 2

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return 2

    def embed_extra_tokens(self, images: Sequence[ImageRows]) -> Tensor:
        return self.queries.repeat(len(images), 1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        assert outputs.pixels is not None
        wanted = outputs.pixels.mean((2, 3)).repeat_interleave(2, 0)
        return LossTerm((self.head(outputs.extra_states()) - wanted).square().sum())


class Contrastive(Base):
    """Tells images of the batch apart, and says so."""

    batch_dependent = True

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return 1

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        pooled = F.normalize(self.head(outputs.per_image_mean(outputs.states())), dim=-1)
        return LossTerm(F.cross_entropy(pooled @ pooled.T, torch.arange(len(pooled)), reduction="sum"))


class Detached(Base):
    """A probe: its head learns, the model does not."""

    def errors(self, outputs: Outputs) -> Tensor:
        return (self.head(outputs.states().detach()) - outputs.randn_rows(3, name="noise")).square().sum(-1)


class Averaged(Base):
    """Its target is a moving average of its own head."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.average = nn.Linear(context.llm_width, 3).requires_grad_(False)

    def errors(self, outputs: Outputs) -> Tensor:
        wanted = self.average(outputs.visual_tokens).detach()
        return (self.head(outputs.states()) - wanted).square().sum(-1)

    @torch.no_grad()
    def after_step(self, step: int, statistics: Any) -> None:
        for old, new in zip(self.average.parameters(), self.head.parameters(), strict=True):
            old.lerp_(new, 0.1)


class WithoutHead(Base):
    """No parameter of its own."""

    def __init__(self, options: Any, context: ObjectiveContext):
        VisionObjective.__init__(self, options, context)

    def errors(self, outputs: Outputs) -> Tensor:
        return (outputs.states() - outputs.visual_tokens).square().sum(-1)


class Colours(Teacher):
    """The mean colour of each cell of a grid; a decoder that paints it; fitted to the mean of all pictures."""

    class Options(foveate.Options):
        """Test."""

        grid: int = Field(2, description="Cells of a side.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.register_buffer("mean", torch.zeros(3))
        self.decoder = nn.Linear(3, 3)

    @classmethod
    def describe(cls, options: Any, context: ObjectiveContext) -> TeacherSpec:
        return TeacherSpec(3, (options.grid, options.grid), (options.grid, options.grid))

    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        small = image.resize((options.grid, options.grid), Image.Resampling.BOX)
        return {"cells": torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(-1, 3)}

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        cells = inputs.stack("cells").to(self.mean.dtype) / 255 - self.mean  # type: ignore[arg-type, operator]
        return [{"colours": colours} for colours in cells]

    @classmethod
    def needs_fit(cls, options: Any) -> bool:
        return True

    def fit(self, batches: Any) -> dict[str, float]:
        seen = [inputs.stack("cells").double().mean((0, 1)) / 255 for inputs, _ in zip(batches, range(3), strict=False)]
        self.mean.copy_(torch.stack(seen).mean(0))  # type: ignore[operator]
        return {"mean": float(self.mean.mean())}  # type: ignore[operator]


class Painter(VisionObjective):
    """Regresses through a frozen decoder of a teacher that recipes name."""

    teacher_in_loss = True

    class Options(ObjectiveOptions):
        """Test."""

        teacher: TeacherChoice = Field(description="Which.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 3)
        self.grid = options.teacher.cls.describe(options.teacher.options, context).grid

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        teacher: Any = outputs.teacher
        wanted = outputs.on_visual_grid(targets.stack("colours").flatten(0, 1), self.grid)
        return LossTerm((teacher.decoder(self.head(outputs.states())) - wanted).square().sum())


SOUND: tuple[tuple[type[VisionObjective], dict[str, Any]], ...] = (
    (ZeroInitialised, {"gradient_to": ("head", "projector", "llm")}),
    (NegativeCosine, {"gradient_to": ("head", "projector", "llm")}),
    (OneTermAnImage, {}),
    (ValidRows, {}),
    (Attentive, {}),
    (Generative, {"gradient_to": ("head", "projector", "llm")}),
    (Contrastive, {}),
    (Detached, {"gradient_to": ("head",)}),
    (Averaged, {}),
    (WithoutHead, {}),
)
"""Classes, and what is told to `check_objective` beside them."""
