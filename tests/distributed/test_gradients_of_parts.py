"""The gradient of each part of the loss is that of the whole step, whatever the processes and the token budget."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from tests.alone import logged, watched
from tests.distributed.launching import OBJECTIVES, assert_equal, environment, left, torchrun, write
from tests.distributions import on_path

STEPS = 6
LORA = {"projector": 1e-3, "llm": {"lr": 1e-3, "lora": {"r": 2}}, **dict.fromkeys(OBJECTIVES, 1e-3)}
WEIGHTS: dict[str, Any] = {"masked": {0: 0, 4: 2}, "text": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {"wide": {}, "narrow": {}, "lora": {"train": LORA}, "without": {}}


def weight_of(part: str, step: int) -> float:
    return {"masked": min(step, 4) / 2, "text": 0.5}.get(part, 1.0)


def recipes(root: Path, corpus: Path) -> list[Path]:
    """Five samples a step; a narrow micro-batch is about one of them, with or without a picture, a text, or empty."""
    root.mkdir(exist_ok=True)
    stage = {"max_steps": STEPS, "batch_size": 5, "weights": WEIGHTS}
    return [
        write(
            root / name, corpus, [{**stage, **changes}], gradients_every=None if name == "without" else 1,
            hardware={"workers": 0, "tokens_per_microbatch": 16384 if name == "wide" else 60},
        )
        for name, changes in VARIANTS.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Path:
    """Runs of every variant with two processes, as `two/VARIANT/run`."""
    root = tmp_path_factory.mktemp("gradients")
    found = [str(path) for path in recipes(root / "two", shared_corpus)]
    done = subprocess.run(
        [*torchrun(2), "-m", "tests.distributed.train_all", *found],
        capture_output=True, text=True, env=environment(root / "installed"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("variant", ["wide", "narrow", "lora"])
def test_two_processes_measure_what_passes_of_each_part_alone_do(
    folder: Path, shared_corpus: Path, variant: str
) -> None:
    """One process measures it beside its own run; the two runs equal each other in everything."""
    path = next(path for path in recipes(folder / "one", shared_corpus) if path.parent.name == variant)
    with on_path(folder / "installed"), watched(weight_of) as expected:
        train(load_recipe(path), display=Display(quiet=True))
    assert_equal(path.parent / "run", folder / "two" / variant / "run")
    lines, _ = left(folder / "two" / variant / "run")
    assert len(lines) == len(expected) == STEPS
    for line in lines:
        assert logged(line) == pytest.approx(expected[line["stage"], line["step"]], rel=1e-9, abs=1e-9)
    assert {"gradient/half/llm" in line for line in lines} == {True, False}, "it rests in some steps"
    assert lines[0]["gradient/masked/projector"] == 0 < lines[1]["gradient/masked/projector"]
    assert "cosine/text~masked/llm" in lines[1] and "cosine/text~masked/llm" not in lines[0]


def test_it_leaves_no_trace(folder: Path) -> None:
    """Bit by bit, though processes average gradients through hooks that a second backward pass could set off."""
    (lines, weights), (plain, expected) = (left(folder / "two" / name / "run") for name in ("narrow", "without"))
    assert [{key: line[key] for key in line.keys() - logged(line).keys()} for line in lines] == plain
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in weights)
