"""Runs on several processes, launched as users launch them, and what they leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.corpus import recipe_dict, write_recipe
from tests.distributions import install, install_project
from tests.objectives_plugin import environment as with_objectives

ROOT = Path(__file__).parents[2]
OBJECTIVES: dict[str, Any] = {
    "noisy": {},
    "half": {"type": "noisy", "probability": 0.5},
    "masked": {},
    "queries": {"tokens": 2, "fit": True},
    "align": {},
}
"""Shifted, resting in some steps, editing, with a teacher that is fitted, and the template of a plugin."""
LIMIT = 60.0
"""Seconds in which processes must have ended after one of them has; far more than they take."""


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process in which the tests' objectives, the traps and the template of a plugin are installed."""
    first = not folder.exists()
    variables = with_objectives(folder)
    if first:
        install_project(folder, ROOT / "examples" / "plugin_template")
        install(folder, "foveate-traps", {}, traps="tests.distributed.traps")
    return variables


def write(folder: Path, corpus: Path, stages: Sequence[Mapping[str, Any]] = ({},), **changes: Any) -> Path:
    """A recipe in float64 that trains everything, in stages that differ from the tests' common one as given."""
    folder.mkdir(exist_ok=True)
    base = recipe_dict(corpus)["stages"][0]
    objectives = changes.setdefault("objectives", OBJECTIVES)
    base |= {"train": {**base["train"], **dict.fromkeys(objectives, 1e-3)}, "batch_size": 3}
    changes.setdefault("precision", {"compute": "fp64", "teachers": "fp64"})
    recipe = recipe_dict(corpus, output=str(folder / "run"), stages=[{**base, **stage} for stage in stages], **changes)
    return write_recipe(folder, recipe)


def torchrun(processes: int) -> list[str]:
    """The words before `-m`; none for one process, which nobody needs to launch."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def accelerate(processes: int) -> list[str]:
    """The same for `accelerate launch`."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]


def trained(launcher: Sequence[str], recipe: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`foveate train` to its end."""
    return subprocess.run(
        [*launcher, "-m", "foveate", "train", str(recipe), *more], capture_output=True, text=True,
        env=environment(recipe.parents[1] / "installed") | variables, timeout=600,
    )  # fmt: skip


@dataclass
class Ended:
    """What the processes of a run have left: exit statuses and, by process, what they wrote to stderr."""

    statuses: list[int]
    words: list[str]

    @property
    def errors(self) -> list[str]:
        """Every error that was told, by any process."""
        return [line for words in self.words for line in words.splitlines() if line.startswith("error: ")]


def by_hand(
    processes: int, recipe: Path, *more: str, prepare: Mapping[int, Callable[[], None]] | None = None, **variables: str
) -> Ended:
    """`foveate train` in processes that nothing but the environment joins: no launcher ends the others.

    `prepare`: what a process of that number does before it begins. Fails where one does not end in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= environment(recipe.parents[1] / "installed") | variables | {"MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "foveate", "train", str(recipe), *more], text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=(recipe.parent / f"stderr{rank}").open("w"),
            preexec_fn=(prepare or {}).get(rank),
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        pid, status = os.wait()  # the first that ends
        first = next(process for process in started if process.pid == pid)
        first.returncode = os.waitstatus_to_exitcode(status)
        for process in started:
            process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"processes hang: {[process.poll() for process in started]}")
    finally:
        for process in started:
            process.kill()
    words = [(recipe.parent / f"stderr{rank}").read_text() for rank in range(processes)]
    return Ended([process.returncode for process in started], words)


def left(run: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Lines of metrics but for those of time, and every weight of the model and its objectives' heads."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in ("step_seconds", "data_wait")} for line in lines]
    files = sorted((run / "model").rglob("*.safetensors"))
    return kept, {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


def assert_equal(run: Path, other: Path, gap: float = 1e-9, weights: bool = True) -> None:
    """Every metric of two runs, and every weight, within `gap`."""
    (lines, tensors), (other_lines, other_tensors) = left(run), left(other)
    assert len(lines) == len(other_lines)
    for line, again in zip(lines, other_lines, strict=True):
        assert line.keys() == again.keys()
        for key, value in line.items():
            where = f"{key} of {line['stage']} step {line['step']}"
            assert again[key] == (value if key == "stage" else pytest.approx(value, rel=gap, abs=gap)), where
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items() if weights else ():
        torch.testing.assert_close(other_tensors[name], tensor, atol=gap, rtol=gap, msg=f"{name} differs")
