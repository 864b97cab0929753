"""Hardware changes nothing: 1, 2 and 4 processes, two token budgets, the same losses and weights."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.data.steps import StepBatches
from foveate.data_room import DataRoom
from foveate.model.build import blueprint
from foveate.recipe_file import load_recipe
from tests.distributed.launching import assert_equal, environment, left, torchrun, write
from tests.distributions import on_path

STEPS = 20
WIDE, NARROW = 16384, 60
"""Tokens of a micro-batch: all samples of a process in one; about one sample each."""
VARIANTS: dict[str, dict[str, Any]] = {
    "wide": {"hardware": {"workers": 0, "tokens_per_microbatch": WIDE}},
    "narrow": {"hardware": {"workers": 0, "tokens_per_microbatch": NARROW}},
    "single": {"precision": {"compute": "fp32"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Path:
    """Runs of every variant with 1, 2 and 4 processes, as `N/VARIANT/run`; those of one N in the same processes.

    There are three held-out samples, fewer than processes.
    """
    root = tmp_path_factory.mktemp("hardware")
    data = {"path": str(shared_corpus / "data.json"), "images": str(shared_corpus / "images"), "max_samples": 3}
    stage = {"max_steps": STEPS, "batch_size": 5, "validate": {"data": [data], "every": 7}}
    for processes in (1, 2, 4):
        (root / str(processes)).mkdir()
        recipes = [
            str(write(root / str(processes) / name, shared_corpus, [stage], **changes))
            for name, changes in VARIANTS.items()
        ]
        done = subprocess.run(
            [*torchrun(processes), "-m", "tests.distributed.train_all", *recipes],
            capture_output=True, text=True, env=environment(root / "installed"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return root


def works(folder: Path, variant: str, processes: int) -> Iterator[list[StepBatches]]:
    """Step by step, what each process computes."""
    with on_path(folder / "installed"):
        recipe = load_recipe(folder / str(processes) / variant / "recipe.yaml")
        room = DataRoom(recipe, blueprint(recipe.model))
        data = [room.stage(recipe.stages[0], rank, processes) for rank in range(processes)]
        for step in range(STEPS):
            yield [found for own in data if isinstance(found := own[step], StepBatches)]


def test_the_steps_are_hard_cases(folder: Path) -> None:
    """Samples without an image in every run; of four processes some without any, or without a sample, in a step."""
    for processes in (1, 2, 4):
        for variant, steps in (("wide", 1), ("narrow", 2)):
            found = list(works(folder, variant, processes))
            assert all(len(work) == processes for work in found)
            ids = {name for work in found for own in work for batch in own.batches for name in batch.sample_ids}
            assert any(name.startswith("text") for name in ids)
            assert any(name.startswith("bare") for name in ids)
            assert max(len(own.batches) for work in found for own in work) >= steps
            seen = [{(bool(own.samples), bool(own.images)) for own in work} for work in found]
            lone = [kinds for kinds in seen if {(True, False), (True, True)} <= kinds]
            idle = [kinds for kinds in seen if {(False, False), (True, True)} <= kinds]
            assert (bool(lone), bool(idle)) == (processes == 4, processes == 4)


@pytest.mark.parametrize("variant", ["wide", "narrow"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_and_budget_change_nothing(folder: Path, processes: int, variant: str) -> None:
    assert_equal(folder / "1" / "wide" / "run", folder / str(processes) / variant / "run")
    lines, _ = left(folder / str(processes) / variant / "run")
    assert [line["step"] for line in lines if "valid/loss/align" in line] == [7, 14, 20]


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_in_single_precision(folder: Path, processes: int) -> None:
    assert_equal(folder / "1" / "single" / "run", folder / str(processes) / "single" / "run", 1e-5, weights=False)
