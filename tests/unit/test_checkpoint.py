"""Checkpoints are complete or absent, checked, strict, and bring training back bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
)
from foveate.errors import RunError
from foveate.files import atomic_folder, write_json

torch.set_num_threads(1)


def save(stage: Path, step: int, **tensors: Tensor) -> Path:
    folder = checkpoint_folder(stage, step)
    save_checkpoint(folder, {"weights": tensors or {"w": torch.full((4,), float(step))}}, {"step": step})
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tensors_and_state_come_back_exactly(tmp_path: Path) -> None:
    tied = nn.Parameter(torch.randn(5, 3))
    table = torch.randn(6, 4)
    weights = {
        "embed.weight": tied,
        "head.weight": tied,
        "turned": table.t(),
        "row": table[2],
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7.0, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "codes": torch.arange(4),
    }
    folder = checkpoint_folder(tmp_path / "align", 12)
    state = {"stage": "align", "step": 12, "skipped": ["é"], "rng": {"a": [1, 2]}}
    save_checkpoint(folder, {"weights": weights, "optimizer": {"exp_avg/x": torch.ones(2)}}, state)
    loaded = load_checkpoint(folder)
    assert loaded.state == state
    assert loaded.tensors["weights"].keys() == weights.keys()
    for name, tensor in weights.items():
        found = loaded.tensors["weights"][name]
        assert found.dtype == tensor.dtype and found.equal(tensor), name
    assert loaded.tensors["optimizer"]["exp_avg/x"].tolist() == [1.0, 1.0]
    assert (folder / "weights.safetensors").stat().st_size < 1200, "tied weights and views are written once, whole"
    assert not list(folder.parent.glob(".*"))


def test_the_newest_two_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-11"]
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 11)


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, w=torch.zeros(2))
    folder = save(tmp_path, 5, w=torch.ones(2))
    assert load_checkpoint(folder).tensors["weights"]["w"].tolist() == [1.0, 1.0]
    assert [path.name for path in folder.parent.iterdir()] == ["step-5"]


def test_a_write_that_was_cut_off_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    before = tree(folder)
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "import foveate.checkpoint as c\n"
        "c.write_json = lambda *a: os._exit(9)\n"  # the machine dies after the tensors, before the state
        "c.save_checkpoint(c.checkpoint_folder(Path(sys.argv[1]), 6), {'weights': {'w': torch.ones(4)}}, {})\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ).returncode == 9
    assert latest_checkpoint(tmp_path) == folder
    assert tree(folder) == before
    save(tmp_path, 6)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-5", "step-6"]


def test_a_full_disk_is_an_error_and_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    before = tree(folder)
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from foveate.checkpoint import checkpoint_folder, save_checkpoint\n"
        "from foveate.errors import RunError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    save_checkpoint(checkpoint_folder(Path(sys.argv[1]), 6), {'weights': {'w': torch.ones(99999)}}, {})\n"
        "except RunError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert "step-6 cannot be written" in done.stderr and "File too large" in done.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["step-5"]
    assert tree(folder) == before


def test_a_place_that_cannot_hold_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "align").write_text("a file where the stage's folder should go")
    with pytest.raises(RunError, match="step-6 cannot be written: Not a directory"):
        save(tmp_path / "align", 6)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 6)
    weights = folder / "weights.safetensors"
    original = weights.read_bytes()
    for broken, words in (
        (original[:-1] + bytes([original[-1] ^ 1]), "weights.safetensors is damaged"),
        (original[:-3], "is damaged"),
        (None, "weights.safetensors cannot be read: No such file"),
    ):
        weights.unlink() if broken is None else weights.write_bytes(broken)
        with pytest.raises(RunError, match=words) as caught:
            load_checkpoint(folder)
        assert f"Delete {folder}: --resume then goes on from the checkpoint before it, step-5" in str(caught.value)
    (folder / "complete.json").unlink()
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 5)
    with pytest.raises(RunError, match=r"complete\.json is missing"):
        load_checkpoint(folder)


def test_a_folder_that_fails_half_way_is_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target, seal=False) as aside:
        (aside / "a.txt").write_text("first")
    with pytest.raises(ZeroDivisionError), atomic_folder(target, seal=False) as aside:
        (aside / "a.txt").write_text("second")
        _ = 1 / 0
    assert tree(target) == {"a.txt": b"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with atomic_folder(target, seal=False) as aside:
        (aside / "b.txt").write_text("third")
    assert tree(target) == {"b.txt": b"third"}
    write_json(tmp_path / "x" / "y.json", {"å": 1})
    assert json.loads((tmp_path / "x" / "y.json").read_text(encoding="utf-8")) == {"å": 1}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(self.embed(ids)).tanh())
        return nn.functional.cross_entropy(logits, ids.roll(1))


def start() -> tuple[Tied, torch.optim.AdamW, dict[str, Tensor]]:
    torch.manual_seed(3)
    model = Tied()
    names = dict(model.named_parameters())
    assert "head.weight" not in names
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), dict(names)


def train(model: Tied, optimizer: torch.optim.AdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model((torch.arange(20) * (step + 1)) % 11)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_goes_on_bit_by_bit_after_a_round_trip(tmp_path: Path) -> None:
    model, optimizer, _ = start()
    straight = train(model, optimizer, range(6))
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model, optimizer, names = start()
    first = train(model, optimizer, range(3))
    folder = checkpoint_folder(tmp_path, 3)
    save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer_state(optimizer, names)}, {})

    torch.manual_seed(99)
    model = Tied()
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    loaded = load_checkpoint(folder)
    model.load_state_dict(loaded.tensors["model"], strict=True)
    load_optimizer_state(optimizer, names, loaded.tensors["optimizer"])
    assert first + train(model, optimizer, range(3, 6)) == straight
    assert all(tensor.equal(end[name]) for name, tensor in model.state_dict().items())
    assert model.unused.weight not in optimizer.state


def test_optimizer_state_of_another_stage_is_refused() -> None:
    model, optimizer, names = start()
    train(model, optimizer, range(1))
    flat = optimizer_state(optimizer, names)
    fewer: dict[str, Any] = {name: p for name, p in names.items() if not name.startswith("mix")}
    with pytest.raises(RunError, match=r"0 parameters are missing \(\), 2 unknown \(mix\.bias, mix\.weight\)"):
        load_optimizer_state(optimizer, fewer, flat)
    with pytest.raises(RunError, match=r"missing \(embed\.weight\), 0 unknown"):
        load_optimizer_state(optimizer, names, {k: t for k, t in flat.items() if not k.endswith("embed.weight")})
    with pytest.raises(RunError, match=r"exp_avg of mix\.weight has shape \(2, 6\), needed \(6, 6\)"):
        load_optimizer_state(optimizer, names, flat | {"exp_avg/mix.weight": torch.zeros(2, 6)})
