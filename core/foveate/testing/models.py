"""Tiny models and samples for the conformance kit and the pytest plugin: real data paths, no files, no network.

Pictures are textures made by a seed, the tokenizer is trained on the spot, the LMM is a SigLIP of two blocks, an MLP,
and a Qwen2 of four blocks, in float64, with weights so large that gradients are not tiny.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from torch import nn

from foveate.data.packing import pack
from foveate.data.sample import SampleRules, build_sample, load_pixels, stand_ins
from foveate.data.templates import load_template
from foveate.data.tokenizer import train_tokenizer
from foveate.data.views import ObjectiveRule
from foveate.errors import PluginError, UserError
from foveate.explain import explain
from foveate.fitting import start_head
from foveate.forward_pass import teacher_inputs, visual_tokens
from foveate.learner import Learner
from foveate.model.build import Blueprint, PartPlan, build_lmm
from foveate.model.encoder import TransformersEncoder
from foveate.model.language import TransformersLLM
from foveate.model.lmm import LMM
from foveate.model.projector import MLPProjector
from foveate.objective import EditInputs, Moment, ObjectiveContext, ObjectiveOptions, TeacherInputs, VisionObjective
from foveate.plugins import Plugins, Registration, installed_plugins
from foveate.registry import load_registry, resolve
from foveate.targets import TeacherRoom
from foveate.types import Batch, Conversation, ImageRef, ImageRole, Sample, Turn

PATCH = 4
"""Pixels of a side of the encoder's patches."""

QUESTION, ANSWER = "What is shown?", "Stripes and spots."
WIDE = (40, 16)
"""Width and height of the picture that is padded to a square; the others are square, of 24 pixels."""

FIT_PICTURES, FIT_LIMIT = 20, 1000
"""Batches of new pictures for a fit, again and again as in a training run, and how many a fit may take."""


@dataclass(frozen=True)
class Layout:
    """A kind of sample: what the user says (None: no text at all), its pictures, and its chat template."""

    text: str | None
    pictures: tuple[tuple[int, int], ...] = ()
    template: str = "chatml"


_SQUARE = (24, 24)
LAYOUTS: dict[str, Layout] = {
    "text only": Layout("Say hello to everybody."),
    "image first": Layout("<image>", (_SQUARE,), "plain"),
    "image only": Layout(None, (_SQUARE,)),
    "two images only": Layout(None, (_SQUARE, WIDE)),
    "one image": Layout(f"<image>\n{QUESTION}", (_SQUARE,)),
    "another image": Layout(f"<image>\n{QUESTION}", (_SQUARE,)),
    "two images": Layout("This <image> or that <image>?", (_SQUARE, _SQUARE)),
    "adjacent images": Layout(f"<image><image>\n{QUESTION}", (_SQUARE, _SQUARE)),
    "wide picture": Layout(f"<image>\n{QUESTION} It is wide.", (WIDE,)),
}
"""Kinds of samples. `plain` puts an image where the sample begins, `chatml` behind some text; a wide picture is padded;
"one image" and "another image" have one length. For objectives on `target` images every picture is there twice, in
both roles."""


def texture(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A picture of coloured blots under noise; `size` is (width, height)."""
    blots = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC), dtype=np.int64)
    noisy = smooth + random.integers(-40, 41, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def conversations(roles: Sequence[ImageRole], seed: int) -> dict[str, Conversation]:
    """One conversation of every kind, with pictures of their own."""
    random, made = np.random.default_rng(seed), dict[str, Conversation]()
    for kind, layout in LAYOUTS.items():
        pictures = [texture(random, size) for size in layout.pictures]
        targets = [texture(random, size) for size in layout.pictures if "target" in roles]
        images = [ImageRef(picture, "input") for picture in pictures]
        images += [ImageRef(picture, "target") for picture in targets]
        turns = () if layout.text is None else (Turn("user", layout.text), Turn("assistant", ANSWER))
        made[kind] = Conversation(f"{kind}/{seed}", turns, tuple(images))
    return made


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer, trained on the layouts' texts."""
    return train_tokenizer([layout.text or "" for layout in LAYOUTS.values()] + [ANSWER], 320)


def tiny_rules(lmm: LMM, objectives: Sequence[ObjectiveRule] = ()) -> SampleRules:
    """How conversations become samples of a tiny LMM; every packed row shows the model an image."""
    tokenizer = tiny_tokenizer()
    template, grid = load_template("chatml", tokenizer), lmm.encoder.spec.grid
    return SampleRules(tokenizer, template, lmm.encoder.spec, grid, objectives=tuple(objectives), shows=True)


def tiny_samples(rules: SampleRules, seed: int = 0) -> dict[str, Sample]:
    """One sample of every kind, its pictures opened."""
    roles: list[ImageRole] = [rule.cls.role for rule in rules.objectives]
    samples = {}
    for kind, conversation in conversations(roles, seed).items():
        template = load_template(LAYOUTS[kind].template, rules.tokenizer)
        samples[kind] = load_pixels(build_sample(conversation, replace(rules, template=template)), rules)
    return samples


def pack_with_stand_ins(samples: Sequence[Sample], rules: SampleRules) -> Batch:
    """A packed row, with the dummy picture that it may need."""
    return pack([*samples, *stand_ins(samples, rules)], rules.objectives)


def tiny_batches(rules: SampleRules, seed: int = 0) -> dict[str, Batch]:
    """A row of each kind of sample by itself, and "mixed": one row of all."""
    samples = tiny_samples(rules, seed)
    rows = {kind: [sample] for kind, sample in samples.items()} | {"mixed": list(samples.values())}
    return {kind: pack_with_stand_ins(row, rules) for kind, row in rows.items()}


def tiny_lmm(side: int = 4, seed: int = 0) -> LMM:
    """An LMM with `side` × `side` visual tokens an image, in float64, the encoder frozen; one seed gives one model."""
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "image_size": PATCH * side, "patch_size": PATCH, "vision_use_head": False,
    }  # fmt: skip
    language = {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }  # fmt: skip
    parts: dict[str, PartPlan] = {}
    made: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("encoder", TransformersEncoder, {"config": vision, "layer": -1}),
        ("projector", MLPProjector, {"depth": 2}),
        ("llm", TransformersLLM, {"config": language}),
    )
    for name, cls, options in made:
        parts[name] = PartPlan(name, cls, cls.Options.model_validate(options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lmm = build_lmm(Blueprint(parts), len(tiny_tokenizer())).double()
    _spread(lmm, torch.Generator().manual_seed(seed))
    lmm.encoder.eval().requires_grad_(False)
    return lmm


@torch.no_grad()
def _spread(lmm: nn.Module, random: torch.Generator) -> None:
    """Weights that keep the size of what goes through them, biases and norms that do something."""
    for module in lmm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise if isinstance(module, nn.Embedding) else noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (name == "weight"))


@dataclass(frozen=True)
class Chosen:
    """An objective to look at: the class, its options, and, where it was asked for by name, what registered it."""

    name: str
    cls: type[VisionObjective]
    options: ObjectiveOptions
    registration: Registration | None = None


def choose(
    objective: str | type[VisionObjective], options: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> Chosen:
    """The class and its checked options; a name is a preset or a registered type, as in a recipe.

    Raises `PluginError` for an unknown name and for options that do not fit, and says what is wrong with each.
    """
    plugins = plugins or installed_plugins()
    context, given = {"plugins": plugins}, dict(options or {})
    name = objective if isinstance(objective, str) else objective.__name__.lower()
    try:
        if isinstance(objective, str):
            key = "preset" if objective in load_registry()[0].presets["objectives"] else "type"
            found = resolve("objectives", {key: objective, **given}, context)
            checked: Any = found.options
            return Chosen(name, found.cls, checked, plugins.find("objectives", found.type))
        return Chosen(name, objective, objective.Options.model_validate(given, context=context))
    except ValidationError as error:
        known = explain(error, objective.Options) if not isinstance(objective, str) else error
        told = [": ".join(filter(None, (".".join(map(str, x["loc"])), x["msg"]))) for x in known.errors()]
    except PydanticCustomError as error:
        told = [error.message()]
    raise PluginError(f"objective '{name}' cannot be checked: {'; '.join(told)}")


def build_objective(chosen: Chosen, lmm: LMM, name: str, seed: int = 0) -> VisionObjective:
    """The objective with a fresh head for a model, seeded by its name, as core builds it."""
    spec = lmm.encoder.spec
    context = ObjectiveContext(name, lmm.llm.width, len(lmm.llm.blocks()), spec.grid, spec, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Moment(seed).seed_of("head", name))
        return chosen.cls(chosen.options, context)


class Bench:
    """An objective on a tiny model: `learner`, `objective`, `teachers`, `rules` and `samples`, all in float64.

    Its teacher is fitted where it needs a fit, and a fresh head started. `objective`: else a fresh one. `teachers_of`:
    the bench whose teachers it shares. `others`: more objectives, that come before it.
    """

    def __init__(
        self, chosen: Chosen, lmm: LMM, seed: int = 0, *, objective: VisionObjective | None = None,
        teachers_of: Bench | None = None, others: Mapping[str, VisionObjective] | None = None,
    ):  # fmt: skip
        self.name, self.lmm = chosen.name, lmm
        self.objective = objective or build_objective(chosen, lmm, chosen.name, seed).double()
        objectives = {**(others or {}), self.name: self.objective}
        self.teachers = TeacherRoom(objectives, "cpu", torch.float64, torch.float64)
        self.learner = Learner(lmm, objectives, self.teachers)
        self.rule = self.learner.rules[self.name]
        self.rules = tiny_rules(lmm, tuple(self.learner.rules.values()))
        self.samples = tiny_samples(self.rules, seed)
        if teachers_of is None:
            self.teachers.fit(self.name, self._pictures)
        else:
            self.teachers._teachers.update(teachers_of.teachers._teachers)
        if objective is None:
            start_head(self.objective, self.name, self._tokens())

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """A packed row of samples, with the stand-in that it may need."""
        return pack_with_stand_ins(samples, self.rules)

    @property
    def mixed(self) -> Batch:
        """A row of one sample of every kind."""
        return self.pack(list(self.samples.values()))

    def _pictures(self) -> Iterator[TeacherInputs]:
        """Pictures for a fit, batch after batch."""
        return (teacher_inputs(batch, self.rule, self.lmm.encoder) for batch in self._batches("fit_teacher"))

    def _tokens(self) -> Iterator[EditInputs]:
        """Visual tokens to start the head from, batch after batch."""
        batches = self._batches("start_head")
        return (visual_tokens(self.lmm, batch, self.name, Moment(stage="start")) for batch in batches)

    def _batches(self, method: str) -> Iterator[Batch]:
        made: list[Batch] = []
        for number in range(FIT_LIMIT):
            if number < FIT_PICTURES:
                samples = [sample for sample in tiny_samples(self.rules, 1000 + number).values() if sample.images]
                made.append(self.pack(samples))
            yield made[number % FIT_PICTURES]
        raise UserError(
            f"{method} of '{self.name}' took {FIT_LIMIT} batches and asks for more. Batches never end: leave the "
            "loop when enough pictures have been seen."
        )
