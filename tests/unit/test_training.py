"""The loop: what changes no gradient, what resumes, what stops, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.checkpoint import latest_checkpoint
from foveate.errors import RunError, TrainingError
from foveate.model.build import load_lmm
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.session import Interrupted
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe


def run(
    folder: Path, corpus: Path, *, resume: bool = False, **changes: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train in `folder`; returns the lines of metrics and the weights of the saved model."""
    folder.mkdir(exist_ok=True)
    recipe = recipe_dict(corpus, output=str(folder / "run"), **changes)
    result = train(load_recipe(write_recipe(folder, recipe)), resume=resume, display=Display(quiet=True))
    return result.metrics(), load_lmm(result.folder)[0].state_dict()


def stage(corpus: Path, **changes: Any) -> dict[str, Any]:
    return {**recipe_dict(corpus)["stages"][0], **changes}


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in ("step_seconds", "data_wait")} for line in lines]


def test_token_budget_changes_nothing_in_float64(tmp_path: Path, shared_corpus: Path) -> None:
    """20 steps with text-only and image-only samples: one row a step, a few, and one sample a row."""
    results = []
    for budget in (100_000, 200, 1):
        lines, weights = run(
            tmp_path / str(budget), shared_corpus, precision="fp64", stages=[stage(shared_corpus, max_steps=20)],
            hardware={"workers": 0, "tokens_per_microbatch": budget},
        )  # fmt: skip
        results.append((lines, weights))
    lines, weights = results[0]
    assert len(lines) == 20 and lines[-1]["loss"] < lines[0]["loss"] - 0.5
    for other_lines, other_weights in results[1:]:
        for line, other in zip(lines, other_lines, strict=True):
            for key in ("loss", "loss/text", "grad_norm", "samples", "images", "tokens"):
                assert other[key] == pytest.approx(line[key], rel=1e-9, abs=0)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=1e-9, rtol=1e-9)


def test_token_budget_in_float32(tmp_path: Path, shared_corpus: Path) -> None:
    losses = []
    for budget in (100_000, 200, 1):
        lines, _ = run(
            tmp_path / str(budget), shared_corpus, stages=[stage(shared_corpus, max_steps=20)],
            hardware={"workers": 0, "tokens_per_microbatch": budget},
        )  # fmt: skip
        losses.append(torch.tensor([line["loss"] for line in lines]))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[2], losses[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("saver", ["gradient_checkpointing", "compile"])
def test_memory_savers_change_nothing(saver: str, tmp_path: Path, shared_corpus: Path) -> None:
    plain, weights = run(tmp_path / "plain", shared_corpus, precision="fp64")
    saved, other = run(tmp_path / saver, shared_corpus, precision="fp64", hardware={"workers": 0, saver: True})
    exact = 1e-9 if saver == "gradient_checkpointing" else 1e-6  # norms compute in fp32, which compiling fuses
    assert [line["loss"] for line in saved] == pytest.approx([line["loss"] for line in plain], rel=exact)
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, atol=10 * exact, rtol=10 * exact)


def test_workers_change_nothing(tmp_path: Path, shared_corpus: Path) -> None:
    alone, _ = run(tmp_path / "0", shared_corpus, hardware={"workers": 0})
    helped, _ = run(tmp_path / "2", shared_corpus, hardware={"workers": 2, "prefetch": 3})
    assert timeless(helped) == timeless(alone)


def test_resume_after_a_stop_equals_the_unbroken_run(tmp_path: Path, shared_corpus: Path) -> None:
    """SIGTERM in the second stage, which trains LoRA adapters; metrics and weights are the same bit by bit."""
    adapters = {"llm": {"lr": 1e-2, "lora": {"r": 2}}, "projector": 1e-3}
    stages = [
        stage(shared_corpus, name="first", max_steps=3),
        stage(shared_corpus, name="second", max_steps=6, train=adapters),
    ]
    whole, weights = run(tmp_path / "whole", shared_corpus, stages=stages)

    class Killer(Display):
        def stage(self, name: str, total: int, start: int = 0) -> Any:
            if name == "second" and start == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().stage(name, total, start)

    folder = tmp_path / "broken"
    folder.mkdir()
    recipe = load_recipe(write_recipe(folder, recipe_dict(shared_corpus, output=str(folder / "run"), stages=stages)))
    with pytest.raises(Interrupted, match="after step 1 of stage second"):
        train(recipe, display=Killer(quiet=True))
    assert latest_checkpoint(folder / "run" / "second") is not None
    lines, resumed = run(folder, shared_corpus, stages=stages, resume=True)
    assert timeless(lines) == timeless(whole)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_resume_after_the_end_changes_nothing(tmp_path: Path, shared_corpus: Path) -> None:
    lines, weights = run(tmp_path / "a", shared_corpus)
    again, same = run(tmp_path / "a", shared_corpus, resume=True)
    assert again == lines
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())


def test_existing_run_is_left_alone(tmp_path: Path, shared_corpus: Path) -> None:
    run(tmp_path / "a", shared_corpus)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "run").rglob("*")}
    with pytest.raises(RunError, match="--resume"):
        run(tmp_path / "a", shared_corpus)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "run").rglob("*")}


def test_frozen_parts_stay_and_trained_ones_move(tmp_path: Path, shared_corpus: Path) -> None:
    _, start = run(tmp_path / "start", shared_corpus)
    model = {"from": str(tmp_path / "start" / "run")}
    rules = {"projector": 1e-3, "llm": {"lr": 1e-3, "layers": "-1:"}}
    _, end = run(tmp_path / "end", shared_corpus, model=model, stages=[stage(shared_corpus, train=rules)])
    moved = {name for name, weight in start.items() if not torch.equal(end[name], weight)}
    assert moved and all(name.startswith(("projector.", "llm.model.model.layers.1.")) for name in moved)
    assert {name.split(".")[0] for name in moved} == {"projector", "llm"}


def test_bf16_keeps_frozen_weights_exactly(tmp_path: Path, shared_corpus: Path) -> None:
    """A frozen part is cast to bf16 for the stage; the saved model holds its fp32 values unrounded."""
    _, start = run(tmp_path / "start", shared_corpus)
    model = {"from": str(tmp_path / "start" / "run")}
    stages = [stage(shared_corpus, train={"projector": 1e-3})]
    lines, end = run(tmp_path / "end", shared_corpus, model=model, stages=stages, precision="bf16")
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    for name, weight in start.items():
        assert torch.equal(end[name], weight) != name.startswith("projector."), name


def test_bf16_follows_fp32(tmp_path: Path, shared_corpus: Path) -> None:
    exact, _ = run(tmp_path / "fp32", shared_corpus)
    rounded, _ = run(tmp_path / "bf16", shared_corpus, precision="bf16")
    assert [line["loss"] for line in rounded] == pytest.approx([line["loss"] for line in exact], rel=2e-2)
    assert [line["loss"] for line in rounded] != [line["loss"] for line in exact]


def test_a_part_that_nothing_reads_is_an_error(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.model.lmm import LMM

    see = LMM.see

    def detached(self: LMM, pixels: Tensor, layers: Any) -> Any:
        vision = see(self, pixels)
        vision.tokens = vision.tokens * 0.0
        return vision

    monkeypatch.setattr(LMM, "see", detached)
    with pytest.raises(TrainingError, match="'encoder' is to be trained"):
        run(tmp_path / "a", shared_corpus)


def test_non_finite_loss_names_the_samples(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.learner import Learner

    forward = Learner.forward

    def broken(self: Learner, batch: Any, *others: Any) -> Any:
        output = forward(self, batch, *others)
        if "one0" in batch.sample_ids:
            output.terms["text"].total = output.terms["text"].total * float("nan")
            output.text_by_sample[batch.sample_ids.index("one0")] = float("nan")
        return output

    monkeypatch.setattr(Learner, "forward", broken)
    with pytest.raises(TrainingError, match=r"'text' is not finite in stage only, step \d+; samples: one0\."):
        run(tmp_path / "a", shared_corpus)


def test_validation_and_metrics_lines(tmp_path: Path, shared_corpus: Path) -> None:
    held_out = {"data": [{**stage(shared_corpus)["data"][0], "max_samples": 10}], "every": 2}
    lines, _ = run(tmp_path / "a", shared_corpus, stages=[stage(shared_corpus, max_steps=5, validate=held_out)])
    assert [line["step"] for line in lines if "valid/loss/text" in line] == [2, 4, 5]
    expected = {
        "stage", "step", "loss", "loss/text", "grad_norm", "samples", "images", "tokens", "step_seconds", "data_wait",
        "lr/encoder", "lr/projector", "lr/llm",
    }  # fmt: skip
    assert set(lines[0]) == expected
    assert lines[0]["samples"] == 12


def test_two_checkpoints_are_kept_and_the_model_card_is_json(tmp_path: Path, shared_corpus: Path) -> None:
    run(tmp_path / "a", shared_corpus, checkpoint_every=1)
    folder = tmp_path / "a" / "run"
    assert sorted(path.name for path in (folder / "only" / "checkpoints").iterdir()) == ["step-3", "step-4"]
    card = json.loads((folder / "model" / "foveate.json").read_text())
    assert set(card["parts"]) == {"encoder", "projector", "llm"} and card["visual_grid"] == [4, 4]
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
