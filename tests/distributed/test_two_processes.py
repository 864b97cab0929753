"""The number of processes changes nothing: one process and two on gloo, launched as users launch them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from foveate.model.build import load_lmm
from tests.corpus import recipe_dict, write_recipe
from tests.objectives_plugin import environment

OBJECTIVES: dict[str, Any] = {
    "noisy": {},
    "half": {"type": "noisy", "probability": 0.5},
    "masked": {},
    "queries": {"tokens": 2, "fit": True},
}


def launch(
    folder: Path, corpus: Path, processes: int, objectives: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train 6 steps of mixed samples in float64; returns the lines of metrics and the weights."""
    folder.mkdir()
    stage = {**recipe_dict(corpus)["stages"][0], "max_steps": 6, "batch_size": 5}
    stage["train"] = {**stage["train"], **dict.fromkeys(objectives or {}, 1e-3)}
    precision = {"compute": "fp64", "teachers": "fp64"}
    recipe = recipe_dict(corpus, output=str(folder / "run"), precision=precision, stages=[stage])
    recipe["objectives"] = objectives or {}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "foveate", "train", str(write_recipe(folder, recipe))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder / "installed"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("visual tokens; computes in") == 1, "only the main process speaks"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    heads = {
        f"{path.parent.name}.{name}": tensor
        for path in (folder / "run" / "model" / "objectives").rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    return lines, {**load_lmm(folder / "run")[0].state_dict(), **heads}


@pytest.mark.parametrize("objectives", [{}, OBJECTIVES], ids=["text", "objectives"])
def test_two_processes_equal_one(tmp_path: Path, shared_corpus: Path, objectives: dict[str, Any]) -> None:
    """Five samples a step, text-only and image-only ones among them, over two ranks of unequal shares.

    With objectives: shifted, resting in some steps, editing, and with a teacher that the main process fits.
    """
    lines, weights = launch(tmp_path / "one", shared_corpus, 1, objectives)
    others, other_weights = launch(tmp_path / "two", shared_corpus, 2, objectives)
    assert len(lines) == len(others) == 6
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"stage", "step_seconds", "data_wait"}:
            assert other[key] == pytest.approx(line[key], rel=1e-9, abs=1e-12), key
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-9, rtol=1e-9)
