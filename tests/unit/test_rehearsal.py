"""What a stage tries before its first step: the largest micro-batch, the optimizer's state, a checkpoint, the disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveate.checkpoint import load_checkpoint
from foveate.data_room import DataRoom
from foveate.errors import RunError, TrainingError
from foveate.model.build import blueprint
from foveate.objective import LossTerm
from foveate.recipe_file import load_recipe
from foveate.rehearsal import allocate_state, check_space, without_a_trace
from foveate.stage import StageLoop
from tests.corpus import recipe_dict, write_recipe
from tests.objectives import Noisy
from tests.unit.test_objectives_in_training import run
from tests.unit.test_training import timeless

Usage = namedtuple("Usage", "total used free")


def test_it_leaves_no_trace(tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout in LoRA, noise and an objective that comes later: bit by bit a run that tried nothing."""
    changes: dict[str, Any] = {
        "objectives": {"noisy": {}, "second": {"type": "noisy", "start_step": 2}},
        "train": {"projector": 1e-3, "llm": {"lr": 1e-3, "lora": {"r": 2, "dropout": 0.5}}, "noisy": 1e-2, "second": 1},
        "weight_decay": 0.1,
    }
    objectives = changes.pop("objectives")
    torch.manual_seed(0)
    lines, weights, rehearsed = run(tmp_path / "with", shared_corpus, objectives, **changes)
    monkeypatch.setattr(StageLoop, "_rehearse", lambda self: None)
    torch.manual_seed(0)
    plain_lines, plain_weights, plain = run(tmp_path / "without", shared_corpus, objectives, **changes)
    assert timeless(lines) == timeless(plain_lines)
    assert all(tensor.equal(plain_weights[name]) for name, tensor in weights.items())
    assert (rehearsed.folder / "only" / "checkpoints" / "step-0").exists()
    assert not (plain.folder / "only" / "checkpoints" / "step-0").exists()


@pytest.mark.parametrize("budget", [60, 150, 4000])
@pytest.mark.parametrize("world", [1, 2])
def test_no_step_has_a_larger_micro_batch(tmp_path: Path, shared_corpus: Path, budget: int, world: int) -> None:
    """Over three epochs, on every rank; and all ranks try as many."""
    content = recipe_dict(shared_corpus, hardware={"workers": 0, "tokens_per_microbatch": budget})
    recipe = load_recipe(write_recipe(tmp_path, content))
    room = DataRoom(recipe, blueprint(recipe.model))
    ranks = [room.stage(recipe.stages[0], rank, world) for rank in range(world)]
    tried = [data.largest() for data in ranks]
    assert len({len(each) for each in tried}) == 1
    real = [batch for data in ranks for work in data.steps() for batch in work.batches]
    tokens = max(sum(batch.lengths) - batch.dummy * batch.lengths[-1] for batch in real)
    images = max(sum(not record.dummy for record in batch.images) for batch in real)
    assert max(work.tokens for each in tried for work in each) >= tokens
    assert max(work.images for each in tried for work in each) >= images


class Greedy(Noisy):
    """Asks the allocator for more than any machine has."""

    def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
        torch.empty(1 << 55)
        return super().loss(outputs, targets, state)


def test_too_little_memory_is_told_before_the_first_step(tmp_path: Path, shared_corpus: Path) -> None:
    told = r"largest micro-batch of stage only, [\d,]+ tokens and \d+ images\. Lower hardware\.tokens_per_microbatch"
    with pytest.raises(TrainingError, match=told):
        run(tmp_path, shared_corpus, {"greedy": {}}, types={"greedy": Greedy})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_objective_that_comes_later_is_tried_now(tmp_path: Path, shared_corpus: Path) -> None:
    with pytest.raises(TrainingError, match="out of memory"):
        run(tmp_path, shared_corpus, {"greedy": {"start_step": 3}}, types={"greedy": Greedy})


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the first checkpoint, but not for those that are kept beside it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1 << 10))
    with pytest.raises(RunError, match=r"2 are kept.*Free space"):
        run(tmp_path, shared_corpus, {"noisy": {}}, checkpoint_every=1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    lines = run(tmp_path, shared_corpus, {"noisy": {}}, checkpoint_every=1, resume=True)[0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_space_is_asked_for_no_more_checkpoints_than_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(4000, 3000, 1500))
    assert check_space(tmp_path, 0) == check_space(tmp_path, 1) == 1000
    with pytest.raises(RunError):
        check_space(tmp_path, 2)


def test_state_is_that_of_a_first_step(tmp_path: Path) -> None:
    """Rates, values and the steps that follow are those of an optimizer that never had it; loaded state is kept."""
    modules = [nn.Linear(4, 3).double() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.3, fused=True) for module in modules]
    inputs = torch.randn(5, 4, dtype=torch.double)
    with without_a_trace(modules[0], torch.device("cpu")):
        allocate_state(optimizers[0])
        assert {float(state["step"]) for state in optimizers[0].state.values()} == {0.0}
        assert all(parameter.grad is not None for parameter in modules[0].parameters())
    for _ in range(3):
        for module, optimizer in zip(modules, optimizers, strict=True):
            module(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert modules[0].weight.equal(modules[1].weight)
    before = [state["exp_avg"].clone() for state in optimizers[0].state.values()]
    allocate_state(optimizers[0])
    assert all(a.equal(state["exp_avg"]) for a, state in zip(before, optimizers[0].state.values(), strict=True))


def test_batch_statistics_and_random_states_come_back() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    before, mean = torch.get_rng_state(), module[1].running_mean.clone()
    with without_a_trace(module, torch.device("cpu")):
        module(torch.randn(7, 3)).sum().backward()
        assert not module[1].running_mean.equal(mean)
    assert torch.get_rng_state().equal(before) and module[1].running_mean.equal(mean)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_first_checkpoint_is_one_to_resume_from(tmp_path: Path, shared_corpus: Path) -> None:
    result = run(tmp_path, shared_corpus, {"noisy": {}})[2]
    found = load_checkpoint(result.folder / "only" / "checkpoints" / "step-0")
    assert found.state["step"] == 0 and not found.state["finished"]
    assert any(name.startswith("exp_avg/") for name in found.tensors["optimizer"])
