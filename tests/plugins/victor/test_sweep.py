"""`foveate victor sweep`: one run a size, their accuracies and the plot, with one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.corpus import ENCODER, LLM


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three steps on the built-in digits, and their answers."""
    data = {"type": "digits", "cell_px": 8, "digit_px": 8, "size": 12}
    content = {
        "name": "tiny",
        "model": {"encoder": ENCODER, "projector": {"type": "mlp", "normalize": True}, "llm": LLM},
        "objectives": {"victor": {}},
        "stages": [
            {
                "name": "comprehend", "data": [{**data, "task": "captions"}], "batch_size": 4, "max_steps": 1,
                "train": {"projector": 1e-3, "llm": 1e-3, "victor": 1e-3},
            }
        ],
        "evaluate": {"data": [{**data, "task": "questions", "split": "test"}], "metrics": ["answers"]},
        "hardware": {"workers": 0},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sweep_is_one_command(recipe: Path, tmp_path: Path, foveate_command: Any) -> None:
    out = tmp_path / "sweep"
    words = ("victor", "sweep", recipe, "--pool-size", "16,1", "--out", out, "--set", "seed=3")
    status, shown, error = foveate_command(*words)
    assert status == 0, error
    numbers = json.loads((out / "pool-size.json").read_text())
    assert list(numbers) == ["1", "16"]
    for size, values in numbers.items():
        written = yaml.safe_load((out / f"pool-{size}" / "recipe.yaml").read_text())
        assert (written["objectives"]["victor"]["pool_size"], written["seed"]) == (int(size), 3)
        [evaluation] = json.loads((out / f"pool-{size}" / "evaluation.json").read_text())
        kinds = {key: value for key, value in evaluation["values"].items() if key.endswith("/accuracy")}
        assert {f"{kind}/accuracy": value for kind, value in values.items() if kind != "mean"} == kinds
        assert values["mean"] == pytest.approx(sum(kinds.values()) / len(kinds))
        assert f"pool of {int(size):>6,}: mean {values['mean']:.3f}" in shown
    assert Image.open(out / "pool-size.png").width > 300


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--pool-size", "1,none"), "--pool-size takes whole numbers"),
        (("--pool-size", "0"), "--pool-size takes whole numbers"),
        (("--objective", "ross"), "has no objective 'ross' with a pool; there are: victor"),
        (("--set", "evaluate=null"), "has no `evaluate`"),
    ],
)
def test_what_cannot_be_swept_is_told(
    recipe: Path, tmp_path: Path, foveate_command: Any, words: tuple[str, ...], told: str
) -> None:
    status, _, error = foveate_command("victor", "sweep", recipe, "--out", tmp_path / "sweep", *words)
    assert status == 2 and told in error and not (tmp_path / "sweep").exists()
