"""Recipes that name core's teachers: shared, packed in any way, read in loader processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from torch import Tensor, nn

from foveate import (
    LossTerm,
    ObjectiveContext,
    ObjectiveOptions,
    Outputs,
    Targets,
    TeacherChoice,
    VisionObjective,
    assemble,
)
from foveate.errors import RecipeError
from foveate.recipe_file import load_recipe
from tests.corpus import ENCODER, recipe_dict, write_recipe
from tests.objectives import plugins_with
from tests.unit.teachers.test_autoencoders import KL, VQ
from tests.unit.teachers.test_features import DINO
from tests.unit.test_objectives_in_training import run, same

TEACHERS: dict[str, Any] = {
    "pixels": {"type": "patches", "patch_px": 4, "normalize": True},
    "own": {"type": "features", "normalize": "layer"},
    "dino": {"type": "features", "encoder": {"config": DINO}, "normalize": "l2"},
    "kl": {"type": "autoencoder_kl", "config": KL, "patch": 2},
    "vq": {"type": "vq", "config": VQ, "patch": 2},
}


class Regress(VisionObjective):
    """A linear head from the visual outputs to the first entry of the teacher's records."""

    class Options(ObjectiveOptions):
        """Test."""

        teacher: TeacherChoice = Field(description="Of what.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, options.teacher.cls.describe(options.teacher.options, context).width)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        wanted: Tensor = targets.rows(next(iter(targets[0])))
        return LossTerm((self.head(outputs.states()) - wanted).square().mean(-1).sum())


def test_they_teach_and_packing_changes_nothing_in_float64(tmp_path: Path, shared_corpus: Path) -> None:
    results = [
        run(
            tmp_path / name, shared_corpus, {name: {"teacher": teacher} for name, teacher in TEACHERS.items()},
            types=dict.fromkeys(TEACHERS, Regress), max_steps=3,
            train={"projector": 1e-3, "llm": 1e-3, **dict.fromkeys(TEACHERS, 1e-2)},
            precision={"compute": "fp64", "teachers": "fp64"},
            hardware={"workers": workers, "tokens_per_microbatch": budget},
        )
        for name, budget, workers in (("whole", 100_000, 0), ("small", 60, 1))
    ]  # fmt: skip
    same(*results)
    lines = results[0][0]
    for name in TEACHERS:
        assert lines[-1][f"loss/{name}"] < lines[0][f"loss/{name}"], name


def test_a_recipe_with_wrong_teachers_says_where(tmp_path: Path, shared_corpus: Path) -> None:
    teachers: dict[str, Any] = {
        "one": {"type": "patches", "patch_px": 0},
        "two": {"type": "features", "encoder": ENCODER, "layer": 1},
        "three": {"type": "autoencoder_kl"},
        "four": "patch",
    }
    objectives = {name: {"teacher": teacher} for name, teacher in teachers.items()}
    recipe = recipe_dict(shared_corpus, objectives=objectives)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, recipe), plugins=plugins_with(dict.fromkeys(teachers, Regress)))
    told = str(caught.value)
    for part in ("one.teacher.patch_px", "two.teacher", "put the layer among", "give `pretrained`", "mean 'patches'"):
        assert part in told, told


def test_objectives_that_name_the_same_teacher_share_it(tmp_path: Path, shared_corpus: Path) -> None:
    same_teacher = {"teacher": {"type": "autoencoder_kl", "config": KL, "patch": 2}}
    objectives = {"one": same_teacher, "two": same_teacher, "three": {"teacher": "patches"}}
    recipe = recipe_dict(shared_corpus, objectives=objectives)
    recipe["stages"][0]["train"] |= dict.fromkeys(objectives, 1e-3)
    types = dict.fromkeys(objectives, Regress)
    learner = assemble(load_recipe(write_recipe(tmp_path, recipe), plugins=plugins_with(types))).learner
    rooms = learner.teachers
    assert rooms.of("one") is rooms.of("two") is not rooms.of("three")
    names = {name for name, _ in learner.named_parameters()}
    assert not any("model.encoder" in name for name in names if name.startswith("objectives"))
    assert all(not parameter.requires_grad for parameter in rooms.of("one").parameters())
