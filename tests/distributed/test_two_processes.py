"""The number of processes changes nothing: one process and two on gloo, launched as users launch them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.model.build import load_lmm
from tests.corpus import recipe_dict, write_recipe


def launch(folder: Path, corpus: Path, processes: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train 6 steps of mixed samples in float64; returns the lines of metrics and the weights."""
    folder.mkdir()
    stage = {**recipe_dict(corpus)["stages"][0], "max_steps": 6, "batch_size": 5}
    recipe = recipe_dict(corpus, output=str(folder / "run"), precision="fp64", stages=[stage])
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "foveate", "train", str(write_recipe(folder, recipe))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("visual tokens; computes in") == 1, "only the main process speaks"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return lines, load_lmm(folder / "run")[0].state_dict()


def test_two_processes_equal_one(tmp_path: Path, shared_corpus: Path) -> None:
    """Five samples a step, text-only and image-only ones among them, over two ranks of unequal shares."""
    lines, weights = launch(tmp_path / "one", shared_corpus, 1)
    others, other_weights = launch(tmp_path / "two", shared_corpus, 2)
    assert len(lines) == len(others) == 6
    for line, other in zip(lines, others, strict=True):
        for key in ("loss", "loss/text", "grad_norm", "samples", "images", "tokens"):
            assert other[key] == pytest.approx(line[key], rel=1e-9, abs=0)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-9, rtol=1e-9)
