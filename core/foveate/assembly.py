"""Putting a recipe's model together: LMM, objectives with their heads, teachers, and the learner that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from foveate.checkpoint import read_tensors
from foveate.data_room import DataRoom
from foveate.errors import FoveateError, ModelError, PluginError
from foveate.files import read_json, write_json
from foveate.learner import Learner
from foveate.model.build import Blueprint, blueprint, build_lmm, load_strictly
from foveate.model.lmm import LMM
from foveate.objective import Moment, ObjectiveContext, VisionObjective
from foveate.precision import DTYPES
from foveate.recipe import Recipe
from foveate.targets import TeacherRoom

HEADS = "objectives"
"""The folder beside a model's weights that holds the objectives' heads; no LMM weight is in it."""


@dataclass
class Assembly:
    """A recipe's model and data, ready to be trained by foveate's loop or by your own."""

    recipe: Recipe
    plan: Blueprint
    data: DataRoom
    lmm: LMM
    learner: Learner
    given: frozenset[str]
    """Objectives whose heads came with the model."""


def assemble(recipe: Recipe, device: torch.device | str = "cpu", data: DataRoom | None = None) -> Assembly:
    """Builds what a recipe describes, seeded, all parts in full precision on `device`; nothing is written.

    `data`: where its data have been opened already. Raises `UserError` for whatever does not fit together.
    """
    room = data or DataRoom(recipe, blueprint(recipe.model))
    full = DTYPES["fp64" if recipe.precision.compute == "fp64" else "fp32"]
    set_seed(recipe.seed)
    lmm = build_lmm(room.plan, len(room.tokenizer)).to(device=device, dtype=full)
    objectives = build_objectives(recipe, room.plan, lmm)
    given = set[str]()
    for name, objective in objectives.items():
        if recipe.model.from_ and recipe.objectives[name].options.from_model:  # type: ignore[attr-defined]
            given |= {name} if load_head(objective, name, Path(recipe.model.from_)) else set()
        objective.to(device=device, dtype=full)
    teachers = TeacherRoom(objectives, device, DTYPES[recipe.precision.teachers], full)
    return Assembly(recipe, room.plan, room, lmm, Learner(lmm, objectives, teachers), frozenset(given))


def build_objectives(recipe: Recipe, plan: Blueprint, lmm: LMM) -> dict[str, VisionObjective]:
    """The recipe's objectives with fresh heads; each is seeded by its own name, whatever else there is."""
    built: dict[str, VisionObjective] = {}
    for name, component in recipe.objectives.items():
        context = ObjectiveContext(
            name, lmm.llm.width, len(lmm.llm.blocks()), plan.visual_grid(), plan.encoder_spec(), recipe.seed
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Moment(recipe.seed).seed_of("head", name))
            try:
                built[name] = component.cls(component.options, context)
            except FoveateError as error:
                raise type(error)(f"objective '{name}': {error}") from error
            except Exception as error:
                where = f"{component.cls.__module__}.{component.cls.__qualname__}"
                raise PluginError(f"objective '{name}' cannot be built: {where}: {error!r}") from error
    return built


def save_heads(objectives: Mapping[str, VisionObjective], recipe: Recipe, folder: Path) -> None:
    """Writes `folder/objectives/NAME/`: `objective.json` (type and options) and the head's weights."""
    for name, objective in objectives.items():
        place = folder / HEADS / name
        place.mkdir(parents=True)
        state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in objective.state_dict().items()}
        save_file(state, place / "weights.safetensors")
        write_json(place / "objective.json", recipe.objectives[name].resolved())


def load_head(objective: VisionObjective, name: str, model: Path) -> bool:
    """Loads what `save_heads` wrote for `name` in a model folder or a run; False where there is nothing.

    Raises `ModelError` where the weights do not fit.
    """
    found = [place for place in (model / HEADS / name, model / "model" / HEADS / name) if place.is_dir()]
    if not found:
        return False
    card: dict[str, Any] = read_json(found[0] / "objective.json")
    state = read_tensors(found[0] / "weights.safetensors")
    try:
        load_strictly(objective, state, ("",), f"objective '{name}' of {model} ({json.dumps(card)[:200]})")
    except ModelError as error:
        raise ModelError(f"{error}. To begin with a fresh head: objectives.{name}.from_model: false") from error
    return True
