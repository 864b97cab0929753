"""A finished run, opened again from its folder alone: model, heads, teachers, metrics, and what objectives learned."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from foveate.assembly import HEADS, build_objectives
from foveate.checkpoint import read_tensors
from foveate.data.elsewhere import elsewhere
from foveate.data_room import DataRoom
from foveate.errors import ModelError, PluginError, RecipeError, RunError
from foveate.files import read_json
from foveate.fitting import ENCODER, FIT, WEIGHTS, fitted_before, stored_fit
from foveate.gallery import Gallery, Pictures
from foveate.learner import Learner
from foveate.model.build import CARD, blueprint, build_lmm, load_strictly
from foveate.model.lmm import LMM, PARTS
from foveate.plugins import Plugins, installed_plugins
from foveate.precision import DTYPES
from foveate.recipe import Recipe
from foveate.recipe_file import load_recipe
from foveate.run import RECIPE, Run
from foveate.targets import TeacherRoom

MODEL = "model"
"""The folder of a finished run that holds what it trained."""


@dataclass(frozen=True)
class LoadedRun:
    """A run and what it trained, in evaluation mode, all parts in full precision.

    `recipe` is the run's own, but its `model` is `from` the run, and its `output` where the run lies now. `data` reads
    samples with the run's tokenizer.
    """

    run: Run
    recipe: Recipe
    lmm: LMM
    learner: Learner
    data: DataRoom

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, one an optimizer step."""
        return self.run.metrics()

    def show(
        self, images: Sequence[str | Path | Image.Image], objectives: Collection[str] | None = None, *,
        seed: int | None = None, step: int = 0,
    ) -> Pictures:  # fmt: skip
        """What objectives (default: all) make of images: name → pictures, none where it has no `visualize`.

        `seed` (default: the recipe's) and `step` choose the noise. Raises `DataError` for an image that cannot be read,
        `PluginError` where an objective fails.
        """
        return self.gallery.of_images(images, objectives, seed, step)

    def show_data(
        self, count: int = 8, objectives: Collection[str] | None = None, *, seed: int | None = None, step: int = 0
    ) -> Pictures:
        """The same for the first `count` pictures of the run's held-out data; where it has none, of training data."""
        return self.gallery.of_data(count, objectives, seed, step)

    @property
    def gallery(self) -> Gallery:
        """What draws the pictures."""
        return Gallery(self.recipe, self.learner, self.data)


def load_run(
    folder: str | Path, *, device: torch.device | str | None = None, plugins: Plugins | None = None,
    changes: Sequence[str] = (),
) -> LoadedRun:  # fmt: skip
    """Opens a finished run on `device` (default: the accelerator where there is one); needs nothing but its folder.

    Its data may have moved: then only reading them is an error. `plugins` default to what is installed. `changes` of
    its recipe, as `KEY=VALUE`: options of objectives that change no weight, such as how they draw. Raises
    `RunError` where the folder is not a run, has no model yet, or needs what is not installed here.
    """
    folder = Path(folder).expanduser().resolve()
    check_run(folder)
    recipe = _recipe(folder, plugins or installed_plugins(), changes)
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found if found is not None else "cpu"
    full = DTYPES["fp64" if recipe.precision.compute == "fp64" else "fp32"]
    plan = blueprint(recipe.model)
    data = DataRoom(recipe, plan)
    lmm = build_lmm(plan, None, load_weights=False).to(dtype=full)
    if plan.weights is not None:
        load_strictly(lmm, plan.weights(), tuple(f"{part}." for part in PARTS), str(folder / MODEL))
    objectives = build_objectives(recipe, plan, lmm)
    for name, objective in objectives.items():
        place = folder / MODEL / HEADS / name
        if not place.is_dir():
            raise RunError(f"{place} is missing: the head of objective '{name}' was there when the run had finished.")
        objective.to(dtype=full)
        try:
            load_strictly(objective, read_tensors(place / WEIGHTS), ("",), f"objective '{name}' in {place}")
        except ModelError as error:
            raise RunError(f"{error}. {_advice(folder)}") from error
        objective.to(device)
    teachers = TeacherRoom(objectives, device, DTYPES[recipe.precision.teachers], full)
    learner = Learner(lmm.to(device), objectives, teachers).eval()
    for name in objectives:
        _load_teacher(folder, recipe, name, learner)
    return LoadedRun(Run(folder, main=False), recipe, lmm, learner, data)


def check_run(folder: Path) -> None:
    """Raises `RunError` where a folder is not a finished run, and says what to do."""
    if not (folder / RECIPE).is_file():
        hint = "the folder that `foveate train` wrote, such as runs/NAME"
        hint = str(folder.parent) if (folder / CARD).is_file() and (folder.parent / RECIPE).is_file() else hint
        missing = "it has no recipe.yaml" if folder.is_dir() else "there is no such folder"
        raise RunError(f"{folder} is not a run: {missing}. Give {hint}.")
    if not (folder / MODEL / CARD).is_file():
        moved = "" if Run(folder).recipe()["output"] == str(folder) else f" --set output={folder}"
        command = f"foveate train {folder / RECIPE} --resume{moved}"
        damaged = f"{folder / MODEL / CARD} is missing" if (folder / MODEL).is_dir() else "the run has not finished"
        raise RunError(f"{folder} has no model yet: {damaged}. Go on with it: {command}")


def _recipe(folder: Path, plugins: Plugins, changes: Sequence[str]) -> Recipe:
    """The run's recipe, changed, its model that of the run; data that are not there are left until somebody reads."""
    places = {"output": str(folder), "model": {"from": str(folder / MODEL)}}
    here = [*changes, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in places.items())]
    with suppress(RecipeError, PluginError):
        return load_recipe(folder / RECIPE, here, plugins=plugins)
    try:
        return load_recipe(folder / RECIPE, [*here, "evaluate=null"], plugins=elsewhere(plugins))
    except (RecipeError, PluginError) as error:
        advice = "These changes do not go with it." if changes else _advice(folder)
        raise RunError(f"{folder} cannot be opened: {error}\n{advice}") from error


def _advice(folder: Path) -> str:
    """What the run was trained with, and that this is needed again."""
    manifest = Run(folder).manifest()
    used = ", ".join(f"{name} {version}" for name, version in manifest["plugins"].items())
    release = manifest["versions"].get("foveate")
    return f"The run was trained with foveate {release} and the plugins {used}: install these."


def _load_teacher(folder: Path, recipe: Recipe, name: str, learner: Learner) -> None:
    """A teacher that was fitted: its weights, and the encoder that it was fitted with where that was trained later.

    Other teachers are built when they are first needed.
    """
    teachers = learner.teachers
    key, stored = teachers.keys[name], stored_fit(folder, teachers.keys[name])
    due = name in fitted_before(recipe, recipe.stages[-1]) and learner.rules[name].call("needs_fit")
    if key in teachers.fitted or (stored is None and not due):
        return
    if stored is None:
        raise RunError(f"{folder} lacks the fitted teacher of objective '{name}'. {_advice(folder)}")
    teacher = teachers.of(name)
    if teacher is None:
        raise RunError(f"{stored} holds a fitted teacher, and objective '{name}' builds none. {_advice(folder)}")
    load_strictly(teacher, read_tensors(stored / WEIGHTS), ("",), f"the teacher in {stored}")
    teachers.fitted[key] = read_json(stored / FIT)["told"]
    if (stored / ENCODER).is_file():
        encoder = copy.deepcopy(learner.lmm.encoder).eval().requires_grad_(False)
        load_strictly(encoder, read_tensors(stored / ENCODER), ("",), f"the encoder in {stored}")
        teachers.encoders[key] = encoder
