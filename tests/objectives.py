"""Objectives for tests: each uses another part of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

import foveate
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
from foveate.plugins import Plugins, load_plugins
from foveate.types import ImageRecord


class Noisy(VisionObjective):
    """Predicts per-image noise from shifted states of two layers; no teacher. Everything random is per image."""

    class Options(ObjectiveOptions):
        """Test."""

        shift: int = Field(0, description="Which state.")
        layers: tuple[float, ...] = Field((-1, 0.5), description="Which layers.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 3)

    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(llm=tuple(int(x) if x == int(x) else x for x in options.layers), shift=options.shift)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        states = sum(outputs.states(layer) for layer in type(self).reads(self.options).llm)
        noise = outputs.randn_rows(3, name="noise")
        error = (self.head(states) - noise).square().sum(-1)
        return LossTerm(error.sum(), {"error": (error.sum(), len(error))})


class Masked(VisionObjective):
    """Replaces random visual tokens by a learned vector and reconstructs what stood there; groups of attention."""

    class Options(ObjectiveOptions):
        """Test."""

        wish: str = Field("groups", description="Attention.")
        keep_norm: bool = Field(True, description="Norms.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.mask = nn.Parameter(torch.randn(context.llm_width))
        self.head = nn.Linear(context.llm_width, context.llm_width)

    @classmethod
    def attention(cls, options: Any) -> Any:
        return options.wish

    def edit_visual_tokens(self, inputs: EditInputs) -> Edit:
        masks, groups = [], []
        for number, image in enumerate(inputs.images):
            drawn = torch.rand(image.rows.stop - image.rows.start, generator=inputs.generator(number, "mask"))
            masks.append(drawn < 0.5)
            groups.append((drawn < 0.5).long() + (drawn < 0.25).long())
        edited = torch.cat(masks).to(inputs.tokens.device)
        tokens = self.mask.expand_as(inputs.tokens)
        return Edit(tokens, edited, inputs.tokens.detach(), torch.cat(groups), self.options.keep_norm)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        error = F.smooth_l1_loss(self.head(outputs.states()), state, reduction="none").mean(-1)
        return LossTerm(error.sum(), {"edited": (outputs.edited.sum(), len(error))})


class Queries(VisionObjective):
    """Learned tokens after each image regress what a teacher of its own makes of the raw picture."""

    class Options(ObjectiveOptions):
        """Test."""

        tokens: int = Field(3, description="How many.")
        fit: bool = Field(False, description="Fit the teacher.")
        encoder: bool = Field(False, description="The teacher reads the model's encoder too.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.queries = nn.Parameter(torch.randn(options.tokens, context.llm_width))
        self.head = nn.Linear(context.llm_width, 4)

    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(teacher=(1,) if options.encoder else ())

    @classmethod
    def extra_tokens(cls, options: Any, record: ImageRecord) -> int:
        return options.tokens

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return options.tokens

    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        small = torch.tensor(list(image.resize((2, 2)).convert("L").getdata()), dtype=torch.float64)
        return {"small": small / 255}

    def build_teacher(self) -> nn.Module:
        teacher = nn.Linear(4, 4)
        teacher.register_buffer("scale", torch.ones(()))
        return teacher.double()

    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        small = inputs.stack("small").to(teacher.weight.dtype)
        if self.options.encoder:
            states = inputs.encoder_states(1).unflatten(0, (len(small), -1))
            small = small + states.mean((1, 2))[:, None].to(small.dtype)
        return [{"values": values} for values in teacher(small) * teacher.scale]

    @classmethod
    def needs_fit(cls, options: Any) -> bool:
        return bool(options.fit)

    def fit_teacher(self, teacher: Any, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        seen = []
        for inputs in batches:
            seen.append(inputs.stack("small").double().mean())
            if len(seen) == 3:
                break
        teacher.scale.fill_(float(torch.stack(seen).mean()))
        return {"scale": float(teacher.scale)}

    def embed_extra_tokens(self, images: Sequence[ImageRows]) -> Tensor:
        return self.queries.repeat(len(images), 1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        wanted = targets.stack("values").repeat_interleave(self.options.tokens, 0)
        error = (self.head(outputs.extra_states()) - wanted).square().sum(-1)
        return LossTerm(error.sum(), {"error": (error.sum(), len(error))})


def plugins_with(objectives: Mapping[str, type], teachers: Mapping[str, type] | None = None) -> Plugins:
    """What is installed, and a plugin that registers these."""
    plugin: Any = ModuleType("test_objectives")
    plugin.HOOK_API = 1

    @foveate.hookimpl
    def register_objectives(register: Any) -> None:
        for name, cls in objectives.items():
            register(name, cls)

    @foveate.hookimpl
    def register_teachers(register: Any) -> None:
        for name, cls in (teachers or {}).items():
            register(name, cls)

    plugin.register_objectives, plugin.register_teachers = register_objectives, register_teachers
    plugins = load_plugins()
    plugins.add(plugin, "test-objectives (tests)")
    return plugins


ALL = {"noisy": Noisy, "masked": Masked, "queries": Queries}
