"""A run that is killed again and again ends as one that never was: `pytest -m slow tests/acceptance/test_killed.py`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.corpus import recipe_dict, write_recipe
from tests.objectives_plugin import environment

KILLS = 20
OBJECTIVES: dict[str, Any] = {
    "noisy": {},
    "half": {"type": "noisy", "probability": 0.5},
    "masked": {},
    "queries": {"tokens": 2, "fit": True},
}


def recipe(folder: Path, corpus: Path) -> Path:
    """Two stages of 60 steps, a checkpoint after each step, objectives in both, a teacher that is fitted."""
    folder.mkdir()
    base = recipe_dict(corpus)["stages"][0]
    base = {**base, "train": {**base["train"], **dict.fromkeys(OBJECTIVES, 1e-3)}, "max_steps": 60, "batch_size": 5}
    stages = [{**base, "name": "first"}, {**base, "name": "second"}]
    content = recipe_dict(corpus, output=str(folder / "run"), objectives=OBJECTIVES, stages=stages, checkpoint_every=1)
    return write_recipe(folder, content)


def start(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "foveate", "train", str(path), *more]
    return subprocess.Popen(
        command, env=environment(path.parent / "installed"), text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Metrics but those of time, and every weight of the model and its objectives' heads."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in ("step_seconds", "data_wait")} for line in lines]
    files = sorted((run / "model").rglob("*.safetensors"))
    weights = {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}
    return kept, weights


def moments(run: Path, drawn: random.Random) -> dict[str, Callable[[], bool]]:
    """What a kill waits for: a teacher's fit, a checkpoint that is being written, or any time after a step."""
    seen = {"lines": 0, "until": 0.0}

    def written() -> int:
        return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").is_file() else 0

    def some_time() -> bool:
        if not seen["until"] and written() > seen["lines"]:
            seen["until"] = time.monotonic() + drawn.random()
        return bool(seen["until"]) and time.monotonic() > seen["until"]

    seen["lines"] = written()
    return {
        "fit": lambda: (run / "manifest.json").is_file() and not (run / "teachers" / "queries").is_dir(),
        "checkpoint": lambda: written() > seen["lines"] and any(run.glob("*/checkpoints/.step-*.tmp")),
        "any time": some_time,
    }


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_equals_the_unbroken_one(tmp_path: Path, shared_corpus: Path) -> None:
    whole = recipe(tmp_path / "whole", shared_corpus)
    process = start(whole)
    assert process.wait() == 0, process.communicate()[1]
    path, seed = recipe(tmp_path / "killed", shared_corpus), random.randrange(1 << 30)
    drawn, kills = random.Random(seed), dict.fromkeys(("fit", "checkpoint", "any time"), 0)
    for number in range(KILLS):
        process, run = start(path, "--resume"), tmp_path / "killed" / "run"
        kind = "fit" if number < 2 else drawn.choice(["checkpoint", "any time"])
        due = moments(run, drawn)[kind]
        while process.poll() is None and not due():
            time.sleep(0.0005)
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1]
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills[kind] += 1
    else:
        process = start(path, "--resume")
        assert process.wait() == 0, process.communicate()[1]
    assert sum(kills.values()) == KILLS, f"seed {seed}, killed {kills}"
    (lines, weights), (others, other_weights) = (ended(tmp_path / name / "run") for name in ("whole", "killed"))
    assert others == lines
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())
    left = [file for file in (tmp_path / "killed" / "run").rglob(".*") if file.name.endswith((".tmp", ".old"))]
    assert not left, "what a kill left half-written is cleared away"
