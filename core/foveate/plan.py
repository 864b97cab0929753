"""The plan of a recipe: what each stage trains, how long it is, what it feeds the model. No weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import nn

from foveate.assembly import build_objectives
from foveate.data.dataset import SampleError
from foveate.data.mixture import Mixture
from foveate.data.sample import SampleRules, build_sample
from foveate.data.steps import StageData
from foveate.data_room import DataRoom
from foveate.errors import ModelError, RecipeError
from foveate.explain import did_you_mean
from foveate.export.layout import not_stock
from foveate.model.build import build_lmm
from foveate.optim import part_parameters
from foveate.progress import Display
from foveate.recipe import PARTS, Precision, Recipe, Stage
from foveate.stage_checks import check_objectives

_PROBE = 256
"""Samples of a stage that are tokenized to estimate its tokens."""


@dataclass(frozen=True)
class PartRow:
    """One part in one stage. `how`: trained, frozen, or what limits the training; `lr` None where frozen."""

    part: str
    how: str
    parameters: int
    trained: int
    lr: float | None
    dtype: str


@dataclass(frozen=True)
class StagePlan:
    """One stage. `samples` of an epoch; `tokens_per_step` (visual tokens included) is an estimate, None without one.

    Without data `samples` and `epochs` are None, and `steps` too where the recipe gives none.
    """

    name: str
    parts: list[PartRow]
    samples: int | None
    batch_size: int
    steps: int | None
    epochs: float | None
    tokens_per_step: int | None


@dataclass(frozen=True)
class Plan:
    """What `foveate plan` shows."""

    name: str
    output: str
    image_size: int
    visual_tokens: int
    compute: str
    stages: list[StagePlan]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def make_plan(recipe: Recipe, room: DataRoom, data: bool = True) -> Plan:
    """The plan of a recipe with its data `room`. The model takes no memory for weights; some samples are tokenized.

    Without `data`, nothing of them is read, and what depends on them stays unknown.

    Raises what would else stop the training, at its start or hours later: trackers that are not installed, rules that
    select nothing, parts that do not fit together, a template without a generation mask.
    """
    check_trackers(recipe.trackers)
    warnings = list[str]()
    vocabulary: int | None = None
    try:
        vocabulary = len(room.tokenizer) if data else None
    except ModelError as error:
        warnings.append(f"tokens are not estimated: {error}")
    if not data and not isinstance(room.plan.tokenizer, str):
        why = "the tokenizer is trained on data that were not read; the vocabulary is that of the LLM's config"
        warnings.append(why)
    with torch.device("meta"):
        lmm = build_lmm(room.plan, vocabulary, load_weights=False)
        objectives = build_objectives(recipe, room.plan, lmm)
    warnings += [f"no stock Llava, so an export brings code of its own (--own-code): {why}" for why in not_stock(lmm)]
    check_objectives(recipe, objectives, len(lmm.encoder.blocks()), len(lmm.llm.blocks()))
    modules: dict[str, nn.Module] = {**{part: getattr(lmm, part) for part in PARTS}, **objectives}
    warnings += [
        f"objective {name} compares images of a micro-batch: its loss depends on tokens_per_microbatch and processes"
        for name, objective in objectives.items()
        if objective.batch_dependent
    ]
    stages = []
    for stage in recipe.stages:
        shown = {part: module for part, module in modules.items() if part in (*PARTS, *recipe.active(stage))}
        with torch.device("meta"):
            parts = part_rows(copy.deepcopy(shown), stage, recipe.precision)
        stages.append(_stage_plan(room, stage, parts, vocabulary is not None, data, warnings))
    image, (rows, columns) = room.plan.encoder_spec().image_size, room.plan.visual_grid()
    return Plan(recipe.name, str(recipe.output), image, rows * columns, recipe.precision.compute, stages, warnings)


def _stage_plan(
    room: DataRoom, stage: Stage, parts: list[PartRow], tokenize: bool, data: bool, warnings: list[str]
) -> StagePlan:
    """The stage's length; and its tokens, where there is a tokenizer."""
    if not data:
        return StagePlan(stage.name, parts, None, stage.batch_size, stage.max_steps, None, None)
    rules: Any = room.rules(stage) if tokenize else None
    read = StageData(
        room.sources(stage.data), rules, batch_size=stage.batch_size, epochs=stage.epochs, max_steps=stage.max_steps
    )
    tokens = None
    if rules:
        found = _tokens_of_a_sample(read.mixture, rules, f"{stage.name}: ", bool(rules.objectives), warnings)
        tokens = round(found * stage.batch_size)
    epochs, total = read.total_steps / read.steps_per_epoch, read.total_steps
    if stage.warmup >= total:
        warnings.append(f"{stage.name}: all of its {total} steps are warm-up")
    return StagePlan(stage.name, parts, len(read.mixture), stage.batch_size, total, epochs, tokens)


def part_rows(modules: Mapping[str, nn.Module], stage: Stage, precision: Precision) -> list[PartRow]:
    """A row a part and a rule. Selects parameters, and injects adapters, as the stage's rules say."""
    total = {part: sum(parameter.numel() for parameter in module.parameters()) for part, module in modules.items()}
    full = "fp64" if precision.compute == "fp64" else "fp32"
    heads = [parameter for part in modules.keys() - set(PARTS) for parameter in modules[part].parameters()]
    fixed = {id(parameter) for parameter in heads if not parameter.requires_grad}
    chosen = {part.name: part for part in part_parameters(modules, stage.train, fixed)}
    rows = []
    for part in modules:
        own = {name: rule for name, rule in stage.train.items() if name.partition(".")[0] == part}
        whole = part not in PARTS or (own and not any(rule.lora for rule in own.values()))
        dtype = full if whole else precision.frozen
        if part not in own:
            rows.append(PartRow(part, "frozen, but for" if own else "frozen", total[part], 0, None, dtype))
        for name, rule in own.items():
            how = [f"LoRA r={rule.lora.r}"] if rule.lora else []
            how += [f"blocks {rule.layers}"] if rule.layers else []
            trained = sum(parameter.numel() for parameter in chosen[name].parameters.values())
            size, kind = total.get(name, trained), f"{dtype}, adapters {full}" if rule.lora else dtype
            rows.append(PartRow(name, ", ".join(how) or "trained", size, trained, rule.lr, kind))
    return rows


def _tokens_of_a_sample(mixture: Mixture, rules: SampleRules, where: str, read: bool, warnings: list[str]) -> float:
    """Mean tokens of a sample, from evenly spread ones. What is odd about them goes into `warnings`.

    `read`: an objective reads the pictures of samples without text.
    """
    positions = range(0, len(mixture), max(1, len(mixture) // _PROBE))
    lengths, bad, silent = [], [], 0
    for position in positions:
        source, index = mixture.sample_at(0, position)
        try:
            chosen = mixture.sources[source]
            sample = build_sample(chosen.dataset[index], rules, chosen.objectives)
        except SampleError as error:
            bad.append(error)
            continue
        lengths.append(sample.length)
        silent += not sample.supervised
    seen = f"of the {len(positions)} samples looked at"
    if bad:
        warnings.append(f"{where}{len(bad)} {seen} are unfit, such as: {bad[0]}")
    if silent and not read:
        warnings.append(f"{where}{silent} {seen} have no text, and no objective learns from their pictures")
    return sum(lengths) / max(1, len(lengths))


def check_trackers(names: Sequence[str]) -> None:
    """Raises `RecipeError` for trackers that accelerate does not know, and for those whose package is not installed."""
    known, installed = {str(name) for name in LOGGER_TYPE_TO_CLASS}, {str(name) for name in get_available_trackers()}
    problems = [f"trackers: unknown '{name}'{did_you_mean(name, known)}" for name in names if name not in known]
    for name in names:
        if name in known - installed:
            problems.append(f"trackers: '{name}' is not installed: pip install {name.replace('_', '-')}")
    if problems:
        raise RecipeError(problems)


def render(plan: Plan, display: Display) -> None:
    """The plan for people, on stdout."""
    rows = [
        (stage.name, row.part, row.how, row.parameters, row.trained or None, f"{row.lr:g}" if row.lr else "", row.dtype)
        for stage in plan.stages
        for row in stage.parts
    ]
    notes = [f"an image: {plan.image_size} px, {plan.visual_tokens} visual tokens; computes in {plan.compute}"]
    for stage in plan.stages:
        tokens = f"; about {stage.tokens_per_step:,} tokens a step" if stage.tokens_per_step else ""
        steps = f"{stage.steps:,} steps" if stage.steps else "steps"
        passes = f", {stage.epochs:.3g} epochs of {stage.samples:,}" if stage.epochs else "; the data were not read"
        notes.append(f"{stage.name}: {steps} of {stage.batch_size} samples{passes}{tokens}")
    columns = ("stage", "part", "", "parameters", "trained", "lr", "dtype")
    display.table(plan.name, columns, rows, [*notes, *(f"note: {warning}" for warning in plan.warnings)])
