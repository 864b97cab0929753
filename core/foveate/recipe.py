"""The recipe: every key of the YAML, its type, its default and its meaning, with names resolved to classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo

from foveate.explain import did_you_mean, each, said
from foveate.objective import Weight
from foveate.options import absolute
from foveate.recipe_fields import (
    NOT_EMPTY,
    PARTS,
    BlockSlice,
    Count,
    Dtype,
    FolderName,
    Fraction,
    ModelSource,
    ObjectiveNames,
    Objectives,
    Section,
    TemplateName,
    component,
    context_of,
)
from foveate.registry import Component
from foveate.types import Geometry
from foveate.yaml_tree import Block

SOURCE_KEYS = ("weight", "max_samples", "objectives")
DATASET = "(dataset)"
"""Where a source keeps the data set's own keys, which stand flat beside `SOURCE_KEYS` in the YAML."""


class Model(Section):
    """The LMM's parts: from scratch, pretrained, or those of another model."""

    from_: ModelSource = Field(
        None, alias="from", description="Start from this model: a run, its `model/`, a stock Llava folder or hub id."
    )
    encoder: Annotated[Component | None, component("encoders", "hf", optional=True)] = Field(
        None, description="Vision encoder: a preset, or `type` (default `hf`) and its options."
    )
    projector: Annotated[Component | None, component("projectors", "mlp", optional=True)] = Field(
        None, description="From the encoder's width to the LLM's: a type, or `type` (default `mlp`) and its options."
    )
    llm: Annotated[Component | None, component("llms", "hf", optional=True)] = Field(
        None, description="Language model and its tokenizer: a preset, or `type` (default `hf`) and its options."
    )

    @pydantic.field_validator(*PARTS)
    @classmethod
    def _all_there(cls, part: Component | None, info: ValidationInfo) -> Component | None:
        if part is None and info.data.get("from_", "") is None:
            raise said(f"the required key '{info.field_name}' is missing (or `from` another model)", True)
        return part


class LoraOptions(Section):
    """Low-rank adapters are trained instead of the part's own weights, and merged into them at the stage's end."""

    r: Count = Field(16, description="Rank.")
    alpha: Count = Field(32, description="The update is scaled by `alpha / r`.")
    dropout: Fraction = Field(0.0, description="Dropout before the adapters.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", description="Last names of linear layers.")


class TrainRule(Section):
    """How a part is trained. A number alone is its `lr`."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    weight_decay: float | None = Field(None, ge=0, description="Instead of the stage's.")
    lora: LoraOptions | None = Field(None, description="Train adapters only (`encoder` and `llm`).")
    layers: BlockSlice | None = Field(
        None, description="Train only these blocks, a Python slice: `'-4:'` the last four, `'0:12'` the first twelve."
    )

    @pydantic.field_validator("lora")
    @classmethod
    def _has_adapters(cls, lora: LoraOptions | None, info: ValidationInfo) -> LoraOptions | None:
        if lora is not None and context_of(info).get("part", "llm") not in ("encoder", "llm"):
            raise said("only encoder and llm can be trained by lora; leave it out here")
        return lora


def _train(value: Any, info: ValidationInfo) -> dict[str, TrainRule]:
    if not isinstance(value, dict) or not value:
        raise said("must name what is trained, at least one part, as `part: learning rate`")
    objectives, active = context_of(info).get("objectives"), info.data.get("objectives")

    def check(part: str, rule: Any) -> TrainRule:
        if part not in PARTS and objectives is not None and part.partition(".")[0] not in objectives:
            raise said(f"unknown part {part!r}{did_you_mean(part, {*PARTS, *objectives})}")
        if part not in PARTS and active is not None and part.partition(".")[0] not in active:
            raise said(f"'{part.partition('.')[0]}' is not active in this stage; name it in `objectives`, or not here")
        rule = rule if isinstance(rule, dict | TrainRule) else {"lr": rule}
        return TrainRule.model_validate(rule, context={**context_of(info), "part": part})

    return each(value, check)


def _part_of_the_loss(part: str, info: ValidationInfo) -> str:
    objectives, active = context_of(info).get("objectives"), info.data.get("objectives")
    if part != "text" and objectives is not None and part not in objectives:
        raise said(f"unknown part of the loss {part!r}{did_you_mean(part, {'text', *objectives})}")
    if part != "text" and active is not None and part not in active:
        raise said(f"'{part}' is not active in this stage; name it in `objectives`, or not here")
    return part


class DataSource(Section):
    """A data set (`type`, default `llava`, or `preset`, and its own keys) and how it is used, side by side."""

    dataset: Annotated[Component, component("datasets", "llava", SOURCE_KEYS)] = Field(alias=DATASET)
    weight: float = Field(1.0, gt=0, le=1000, description="How often its samples are drawn, relative to their number.")
    max_samples: Count | None = Field(None, description="Use that many samples at most.")
    objectives: ObjectiveNames | None = Field(None, description="Objectives that apply to it. Default: the stage's.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _nested(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {DATASET: value}
        if not isinstance(value, Block):
            return value
        return {DATASET: value.without(*SOURCE_KEYS), **{key: value[key] for key in SOURCE_KEYS if key in value}}


Data = Annotated[tuple[DataSource, ...], NOT_EMPTY]
Metrics = Annotated[tuple[Annotated[Component, component("metrics")], ...], NOT_EMPTY]


class Validate(Section):
    """Held-out loss of every part of the loss."""

    data: Data = Field(description="Held-out data.")
    every: Count | None = Field(None, description="Steps between validations. There is one at the stage's end too.")


class Evaluate(Section):
    """Metrics on held-out data at the end of the run."""

    data: Data = Field(description="Held-out data.")
    metrics: Metrics = Field(description="Names of metrics, or `type` and options.")
    template: TemplateName | None = Field(None, description="Template of the questions. Default: the last stage's.")


class Stage(Section):
    """One training phase. What `train` does not name is frozen."""

    name: FolderName = Field(description="Its name in the run folder and in the logs.")
    data: Data = Field(description="What it trains on, mixed.")
    template: TemplateName = Field("chat", description="The tokenizer's own (`chat`), or one that comes with foveate.")
    system: str | None = Field(None, description="System prompt of conversations that have none.")
    geometry: Geometry = Field("pad", description="How a picture becomes the encoder's square.")
    objectives: ObjectiveNames | None = Field(None, description="Objectives that are active. Default: all.")
    weights: dict[Annotated[str, AfterValidator(_part_of_the_loss)], Weight] | None = Field(
        None, description="Active objective or `text` → its weight in this stage, instead of the recipe's."
    )
    frozen: ObjectiveNames = Field((), description="Objectives that are active although nothing of them is trained.")
    train: Annotated[dict[str, TrainRule], PlainValidator(_train)] = Field(
        description="Part (`encoder`, `projector`, `llm` or an objective) → learning rate, or the mapping below."
    )
    batch_size: Count = Field(description="Samples of an optimizer step, over all processes.")
    epochs: float | None = Field(None, gt=0, le=1e6, description="Length in passes over the data; or `max_steps`.")
    max_steps: Count | None = Field(None, description="Length in optimizer steps; or `epochs`.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup: Fraction | Count = Field(0.03, description="Linear warm-up: a fraction of the steps, or a number of steps.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; norms and biases have none.")
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="Largest norm of the gradient; null: any.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's decay rates.")
    max_length: Count = Field(2048, description="Longest sample in tokens, visual tokens included.")
    on_long_sample: Literal["error", "drop", "cut"] = Field("error", description="`cut`: at the border of a turn.")
    on_bad_sample: Literal["error", "skip"] = Field("error", description="What a defective sample is.")
    max_bad_rate: float = Field(0.01, ge=0, le=1, description="Share of skipped samples above which training stops.")
    check_samples: Annotated[int, Field(ge=0)] | None = Field(
        2048, description="Samples of each source, evenly spread, that are read whole before training; null: all."
    )
    validate_: Validate | None = Field(None, alias="validate", description="Held-out loss during the stage.")

    @pydantic.field_validator("name")
    @classmethod
    def _unique(cls, name: str, info: ValidationInfo) -> str:
        seen: list[str] = context_of(info).setdefault("stages", [])
        if name in seen:
            raise said(f"two stages are called '{name}'; their names must differ")
        seen.append(name)
        return name

    @pydantic.field_validator("max_steps")
    @classmethod
    def _one_length(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (steps is None) == (info.data["epochs"] is None):
            raise said("give epochs or max_steps" + (", not both" if steps else ", the stage's length"), not steps)
        return steps


class TextLoss(Section):
    """The loss on text: the mean cross-entropy of the supervised tokens."""

    weight: Weight = Field(1.0, description="Its weight in the loss: a number, or step of a stage → number.")


class Precision(Section):
    """Number formats. A name alone is `compute`. Trained weights and their optimizer states are never below fp32."""

    compute: Dtype = Field("fp32", description="Of forward and backward.")
    frozen: Dtype = Field(default_factory=lambda data: data["compute"], description="Of frozen parts; as `compute`.")
    teachers: Dtype = Field("fp32", description="Of the objectives' teachers.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _compute(cls, value: Any) -> Any:
        return {"compute": value} if isinstance(value, str) else value


def _workers() -> int:
    return min(8, max(1, (os.cpu_count() or 2) // 2))


class Hardware(Section):
    """Memory and speed. Nothing here changes a gradient."""

    tokens_per_microbatch: Count = Field(16384, description="Tokens that run at once: the memory knob.")
    workers: int = Field(
        default_factory=_workers, ge=0, le=512, description="Loading processes; half of the cores, at most 8."
    )
    prefetch: Annotated[int, Field(gt=0, le=1024)] = Field(2, description="Batches that a worker prepares ahead.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    compile: bool = Field(False, description="`torch.compile` of every block.")
    threads: Annotated[int, Field(gt=0, le=1024)] | None = Field(
        None, description="CPU threads of a training process. Default: torch's choice."
    )


class Recipe(Section):
    """The whole."""

    name: FolderName = Field(description="Name of the run. Default: the file's name.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of everything that is random.")
    output: Annotated[Path, AfterValidator(lambda path: absolute(path, Path.cwd()))] = Field(
        default_factory=lambda data: Path("runs", data["name"]), description="Run folder, from the current folder; "
        "`runs/NAME`.",
    )  # fmt: skip
    model: Model = Field(description="What is trained.")
    objectives: Objectives = Field(
        {}, description="Name → options of a vision-centric objective; `type` defaults to the name."
    )
    text: TextLoss = Field(TextLoss(), description="The loss on text.")
    stages: Annotated[tuple[Stage, ...], NOT_EMPTY] = Field(description="Training phases, in order.")
    precision: Precision = Field(Precision(), description="Number formats.")
    hardware: Hardware = Field(default_factory=Hardware, description="Memory and speed.")
    checkpoint_every: Count | None = Field(None, description="Steps between checkpoints; a stage's end has one anyway.")
    gradients_every: Count | None = Field(
        None, description="Steps between measurements of the gradient of each part of the loss, in projector and LLM: "
        "norms and cosines. Such a step costs one more backward pass for each part, and the memory of one gradient of "
        "projector and LLM for each part and of one more. Not beside `hardware.compile`.",
    )  # fmt: skip
    trackers: tuple[str, ...] = Field((), description="accelerate's trackers, such as `tensorboard` or `wandb`.")
    log_every: Count = Field(10, description="Steps between lines of progress where there is no terminal.")
    evaluate: Evaluate | None = Field(None, description="Metrics at the end of the run.")

    def active(self, stage: Stage) -> tuple[str, ...]:
        """The objectives that are active in a stage, in the recipe's order."""
        return tuple(name for name in self.objectives if stage.objectives is None or name in stage.objectives)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, presets expanded and paths absolute; `load_recipe` reads them again."""
        resolved: dict[str, Any] = _plain(self)
        return resolved


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        fields = type(value).model_fields
        plain = {info.alias or name: _plain(getattr(value, name)) for name, info in fields.items()}
        return {**plain.pop(DATASET, {}), **plain}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.resolved() if isinstance(value, Component) else str(value) if isinstance(value, Path) else value
