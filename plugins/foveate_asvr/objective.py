"""ASVR (arXiv 2506.09040): from the LLM's states at visual tokens, heads predict discrete codes of what it saw there.

    L = sum over visual tokens i of 1/Q * sum_d -log p(q_{i,d} | state, q_{i,1} … q_{i,d-1})

With `shift: 1`, the paper's equation, the state is that of the token before i, which has not seen i; with `shift: 0`,
the released code, it is the state of i, which has. Core divides the sum by the number of tokens.

Shapes: I images, R visual tokens, D width of the LLM, Q depths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from foveate import (
    ImageRecord,
    LossTerm,
    ObjectiveContext,
    ObjectiveOptions,
    Outputs,
    Picture,
    Reads,
    Targets,
    TeacherInputs,
    VisionObjective,
)
from foveate.errors import ModelError
from foveate_asvr.appearance import AppearanceOptions, AppearanceTokenizer
from foveate_asvr.head import CodeHead, DepthHeadOptions, HeadOptions, make_head
from foveate_asvr.loss import code_losses
from foveate_asvr.tokenizer import SemanticTokenizer, Tokenizer, TokenizerOptions

EARLY = 0.22
"""The layer of `target: early_layer` unless `tokenizer.layer` says another: block 6 of 27."""


class AsvrOptions(ObjectiveOptions):
    """Options of `asvr`."""

    target: Literal["semantic", "appearance", "both", "early_layer"] = Field(
        "semantic", description="What is predicted: codes of late features by `tokenizer`; of `appearance`, which a "
        "decoder turns into pixels; both, by heads of their own; or plain codes of an early layer by `tokenizer`."
    )  # fmt: skip
    shift: Literal[0, 1] = Field(
        1, description="1: the state before a visual token predicts its codes (the paper). 0: its own state (the "
        "released code), which has seen the token."
    )  # fmt: skip
    tokenizer: TokenizerOptions = Field(TokenizerOptions(), description="Codes of features.")
    appearance: AppearanceOptions = Field(AppearanceOptions(), description="Codes of appearance.")
    head: HeadOptions = Field(DepthHeadOptions(), description="What predicts the codes.", validate_default=False)
    depth_weights: tuple[float, ...] | None = Field(
        None, description="Weight of each depth in the mean over depths. Default: all the same."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of the head's matrix products; softmax and sums are in fp32 either way."
    )

    @model_validator(mode="after")
    def _check(self) -> AsvrOptions:
        weights = self.depth_weights
        if weights is not None and (min(weights, default=0) < 0 or not sum(weights) > 0):
            raise ValueError("`depth_weights` are numbers from 0 on, not all of them 0")
        return self

    def tokenizers(self) -> dict[str, tuple[type[Tokenizer], TokenizerOptions]]:
        """What is predicted, by name: class and options of its tokenizer."""
        semantic, appearance = (SemanticTokenizer, self.tokenizer), (AppearanceTokenizer, self.appearance)
        if self.target == "early_layer":
            chosen = self.tokenizer
            if chosen.layer is None and chosen.encoder is None and chosen.pretrained is None:
                chosen = chosen.model_copy(update={"layer": EARLY})
            return {"early_layer": (SemanticTokenizer, chosen)}
        return {
            name: made
            for name, made in {"semantic": semantic, "appearance": appearance}.items()
            if self.target in (name, "both")
        }


class Tokenizers(nn.ModuleDict):
    """The teacher: a tokenizer for each target. Records `[N, Q]` codes by name."""

    def fit(self, batches: Iterable[TeacherInputs]) -> dict[str, float]:
        """One after the other; what each tells, under its name if there are several."""
        told, stream = dict[str, float](), iter(batches)
        for name, tokenizer in self._each():
            due = tokenizer.needs_fit(tokenizer.options)
            found = tokenizer.fit(_within(inputs, name) for inputs in stream) if due else {}
            told |= {f"{name}/{key}" if len(self) > 1 else key: value for key, value in found.items()}
        return told

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        """One record an image."""
        made = {name: tokenizer.encode(_within(inputs, name)) for name, tokenizer in self._each()}
        return [{name: records[at]["codes"] for name, records in made.items()} for at in range(len(inputs.records))]

    def _each(self) -> Iterator[tuple[str, Tokenizer]]:
        for name, tokenizer in self.items():
            assert isinstance(tokenizer, Tokenizer)
            yield name, tokenizer


def _within(inputs: TeacherInputs, name: str) -> TeacherInputs:
    """The pictures as one of several tokenizers has prepared them."""
    start = f"{name}/"

    def own(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(start): view for key, view in views.items() if key.startswith(start)}

    return inputs.with_prepared([own(views) for views in inputs.prepared])


class Asvr(VisionObjective):
    """Sum over visual tokens of the mean over depths of the cross-entropy of their residual codes."""

    Options = AsvrOptions
    teacher_in_loss = True

    def __init__(self, options: AsvrOptions, context: ObjectiveContext):
        """Raises `ModelError` where a tokenizer does not fit the model, or `depth_weights` not the depths."""
        super().__init__(options, context)
        heads: dict[str, CodeHead] = {}
        for name, (cls, chosen) in options.tokenizers().items():
            depth, size, width = cls.sizes(chosen, context)
            if options.depth_weights is not None and len(options.depth_weights) != depth:
                given = len(options.depth_weights)
                raise ModelError(f"depth_weights has {given} entries, and {name} codes have {depth} depths")
            heads[name] = make_head(options.head, context.llm_width, width, depth, size)
        self.heads = nn.ModuleDict(heads)

    @classmethod
    def reads(cls, options: AsvrOptions) -> Reads:
        layers = [layer for cls_, chosen in options.tokenizers().values() for layer in cls_.encoder_layers(chosen)]
        return Reads(teacher=tuple(dict.fromkeys(layers)), shift=options.shift)

    @classmethod
    def prepare_image(cls, options: AsvrOptions, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        views = dict[str, Tensor]()
        for name, (kind, chosen) in options.tokenizers().items():
            made = kind.prepare_image(chosen, image, record)
            views |= {f"{name}/{key}": view for key, view in made.items()}
        return views

    def build_teacher(self) -> Tokenizers:
        made = self.options.tokenizers()
        return Tokenizers({name: cls(chosen, self.context) for name, (cls, chosen) in made.items()})

    def teacher_fingerprint(self) -> str:
        """The tokenizers alone: objectives that differ in shift or head share them, and their fit."""
        made = {name: chosen.model_dump(mode="json") for name, (_, chosen) in self.options.tokenizers().items()}
        facts = [type(self).__module__, made, self.context.visual_grid, vars(self.context.encoder)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @classmethod
    def needs_fit(cls, options: AsvrOptions) -> bool:
        return any(kind.needs_fit(chosen) for kind, chosen in options.tokenizers().values())

    def fit_teacher(self, teacher: Tokenizers, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        return teacher.fit(batches)

    def encode_target(self, teacher: Tokenizers, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        return teacher.encode(inputs)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        states, metrics = outputs.states(), dict[str, tuple[Tensor | float, float]]()
        total = states.new_zeros(())
        for name, head in self.heads.items():
            assert isinstance(head, CodeHead)
            found = code_losses(
                head, states, targets.rows(name), outputs.teacher[name].quantizer, self.depth_weights(head.depth),
                half=self.options.precision == "bf16",
            )  # fmt: skip
            total = total + found.total
            start = f"{name}/" if len(self.heads) > 1 else ""
            for depth, (loss, hits) in enumerate(zip(found.cross_entropies, found.hits, strict=True), 1):
                metrics[f"{start}cross_entropy/{depth}"] = loss, len(states)
                metrics[f"{start}top1/{depth}"] = hits, len(states)
        return LossTerm(total, metrics)

    def depth_weights(self, depth: int) -> Tensor:
        """`[Q]`, their sum is 1."""
        weights = torch.tensor(self.options.depth_weights or (1.0,) * depth, dtype=torch.float64)
        return weights / weights.sum()

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        """Maps of the codes of depth 1, the patches that share one, and what the decoder makes of appearance codes."""
        from foveate_asvr.pictures import draw

        return draw(self, outputs, targets)
