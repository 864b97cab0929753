"""`foveate data digits OUT` and `type: digits` are the same data: same batches, same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import foveate.cli
from foveate.data_room import DataRoom
from foveate.model.build import blueprint
from foveate.progress import Display
from foveate.recipe import Recipe
from foveate.recipe_file import load_recipe
from foveate.training import train
from foveate.types import Batch
from foveate_lab.export import TRAINING_KINDS
from tests.corpus import recipe_dict, write_recipe

CAPTIONS = {"type": "digits", "task": "captions", "size": 40, "density": 0.9, "seed": 3}
QUESTIONS = {
    "type": "digits", "task": "questions", "size": 30, "density": 0.9, "seed": 3, "questions": 4,
    "kinds": list(TRAINING_KINDS),
}  # fmt: skip
HELD_OUT = {"type": "digits", "task": "questions", "size": 20, "density": 0.9, "seed": 3, "split": "test"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "out"
    sizes = {"captions": 40, "questions": 30, "per-scene": 4, "held-out": 20, "density": 0.9, "seed": 3}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as leaving:
        foveate.cli.main(["data", "digits", str(folder), *options])
    assert leaving.value.code == 0
    return folder


def recipe(folder: Path, captions: dict[str, Any], questions: dict[str, Any], held_out: dict[str, Any]) -> Recipe:
    """Two stages, the second mixed and validated, with samples enough that their order is seen."""
    folder.mkdir(exist_ok=True)
    content = recipe_dict(folder)
    common = {**content["stages"][0], "batch_size": 8, "max_steps": 3}
    content["stages"] = [
        {**common, "name": "align", "data": [captions], "template": "plain"},
        {**common, "name": "instruct", "data": [{**captions, "weight": 0.5}, questions], "max_steps": 8,
         "validate": {"data": [held_out]}},
    ]  # fmt: skip
    return load_recipe(write_recipe(folder, content))


@pytest.fixture
def recipes(out: Path, tmp_path: Path) -> tuple[Recipe, Recipe]:
    files = ({"path": str(out / f"{name}.json")} for name in ("captions", "questions", "test"))
    return recipe(tmp_path / "made", CAPTIONS, QUESTIONS, HELD_OUT), recipe(tmp_path / "read", *files)


def same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
    assert one.lengths == other.lengths and one.images == other.images and one.sample_ids == other.sample_ids
    assert [dict(meta) for meta in one.metas] == [dict(meta) for meta in other.metas]


def test_files_give_the_same_batches(recipes: tuple[Recipe, Recipe]) -> None:
    made, read = (DataRoom(recipe, blueprint(recipe.model)) for recipe in recipes)
    assert made.tokenizer.backend_tokenizer.to_str() == read.tokenizer.backend_tokenizer.to_str()
    for one, other in zip(made.recipe.stages, read.recipe.stages, strict=True):
        pairs = [(made.stage(one), read.stage(other))]
        if one.validate_ and other.validate_:
            pairs.append((made.held_out(one.validate_.data, one), read.held_out(other.validate_.data, other)))
        for ours, theirs in pairs:
            assert ours.total_steps == theirs.total_steps
            seen = set()
            for step, again in zip(ours.steps(), theirs.steps(), strict=True):
                assert step.counts == again.counts and step.samples == again.samples and not step.skipped
                for batch, copy in zip(step.batches, again.batches, strict=True):
                    same(batch, copy)
                    seen.update(batch.sample_ids)
            assert len(seen) > 15


def test_files_give_the_same_losses(recipes: tuple[Recipe, Recipe]) -> None:
    lines = [train(recipe, display=Display(quiet=True)).metrics() for recipe in recipes]
    keys = ("stage", "step", "loss", "grad_norm", "samples", "images", "tokens", "valid/loss/text")
    made, read = ([{key: line.get(key) for key in keys} for line in run] for run in lines)
    assert made == read and len(made) == 11 and made[-1]["valid/loss/text"] is not None
