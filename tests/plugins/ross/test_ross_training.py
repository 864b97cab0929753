"""ROSS in runs: the contract, what moves and what is saved, resume, processes, and pictures of a finished run."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from foveate import assemble
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.session import Interrupted
from foveate.stage import StageLoop
from foveate.testing import check_objective
from foveate.training import train
from tests.conftest import Command
from tests.corpus import recipe_dict, write_recipe
from tests.objectives_plugin import environment
from tests.plugins.ross.reference import TEACHERS, small

STEPS = {"sampling": {"steps": 3}}
MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("ross", {"teacher": TEACHERS["flux"], "denoiser": small("dit"), "mask_padding": True, **STEPS}),
    "vit": ("ross", {"teacher": TEACHERS["features"], "denoiser": small("vit"), "prediction": "v", **STEPS}),
    "mlp": ("ross", {"teacher": TEACHERS["vq"], "denoiser": small("mlp"), "schedule": "linear", **STEPS}),
    "pixels": ("ross", {"teacher": TEACHERS["raw"], "variant": "regress_pixels"}),
    "latents": ("ross", {"teacher": TEACHERS["kl"], "variant": "regress_latents", "loss_on": "unedited"}),
    "through": ("ross", {"teacher": TEACHERS["kl"], "variant": "regress_latents_to_pixels", "mask_padding": True}),
}
GENERATIVE = {"teacher": TEACHERS["kl"], "denoiser": small("dit"), "query_grid": [2, 3], **STEPS}
MEMBERS["generative"] = ("ross_generative", GENERATIVE)


@pytest.mark.parametrize("member", MEMBERS)
def test_it_keeps_the_contract(member: str) -> None:
    """Of a generative loss on a prompt, the projector learns nothing where the sample shows no image."""
    name, options = MEMBERS[member]
    parts = ("head", "llm") if name == "ross_generative" else ("head", "projector", "llm")
    report = check_objective(name, options, gradient_to=parts)  # type: ignore[arg-type]
    assert not report.failures and report.of("pictures").told != "0"


HEADS: dict[str, Any] = {
    "ross": {"teacher": TEACHERS["kl"], "denoiser": small("dit"), "draws": 2, **STEPS},
    "through": {"type": "ross", "teacher": TEACHERS["vq"], "variant": "regress_latents_to_pixels"},
}


def recipe(folder: Path, corpus: Path, steps: int = 4, **changes: Any) -> Any:
    """A short run with two heads, encoder frozen."""
    content = recipe_dict(corpus, output=str(folder / "run"), objectives=copy.deepcopy(HEADS), **changes)
    rates = {"projector": 1e-3, "llm": 1e-3, "ross": 1e-2, "through": 1e-2}
    content["stages"][0] |= {"max_steps": steps, "train": rates}
    folder.mkdir(exist_ok=True, parents=True)
    return content


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files below."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.parent.name}:{name}": value for path in files for name, value in load_file(path).items()}


def test_the_llm_learns_of_it_and_the_teacher_is_nowhere(tmp_path: Path, shared_corpus: Path) -> None:
    """Without its losses the same run leaves another projector and LLM behind; no file holds a teacher's weights."""
    left: list[dict[str, Tensor]] = []
    for active in (["ross"], []):
        folder = tmp_path / f"{len(active)}"
        content = recipe(folder, shared_corpus, checkpoint_every=2)
        rates = {"projector": 1e-3, "llm": 1e-3, **dict.fromkeys(active, 1e-2)}
        content["stages"][0] |= {"objectives": active, "train": rates}
        run = train(load_recipe(write_recipe(folder, content)), display=Display(quiet=True))
        left.append(weights(run.folder / "model"))
    for part in ("projector", "llm"):
        names = [name for name in left[0] if name.startswith(f"model:{part}.")]
        assert names and any(not torch.equal(left[0][name], left[1][name]) for name in names), part
    made = assemble(load_recipe(write_recipe(tmp_path, recipe(tmp_path / "never", shared_corpus))))
    names, state = set[str](), made.learner.state_dict()
    for name in HEADS:
        teacher: Any = made.learner.teachers.of(name)
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        mine = {id(value) for value in (*teacher.parameters(), *teacher.buffers())}
        assert mine and mine.isdisjoint(map(id, (*made.learner.parameters(), *made.learner.buffers())))
        names |= set(teacher.state_dict())
    assert {name for name in left[0] if name.startswith("ross:")} == {
        name.replace("objectives.ross.", "ross:") for name in state if name.startswith("objectives.ross.")
    }
    checkpoints = [path for path in (tmp_path / "1").rglob("step-*") if path.is_dir()]
    saved = {name for path in checkpoints for name in weights(path)} | set(left[0])
    assert len(checkpoints) == 2 and len(names) > 50
    assert not [name for name in saved if any(name.endswith(f"model.{end}") for end in names)]


def test_a_run_that_goes_on_in_a_fresh_process_is_the_unbroken_run(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: losses, metrics, the head, the LMM."""
    path = write_recipe(tmp_path, recipe(tmp_path / "whole", shared_corpus, 6), "whole.yaml")
    whole = train(load_recipe(path), display=Display(quiet=True))
    broken, take = tmp_path / "broken", StageLoop._take_step
    path = write_recipe(tmp_path, recipe(broken, shared_corpus, 6), "broken.yaml")

    def stopped(self: StageLoop, *given: Any) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 4 of stage only"):
        patch.setattr(StageLoop, "_take_step", stopped)
        train(load_recipe(path), display=Display(quiet=True))
    command = [sys.executable, "-m", "foveate", "train", str(path), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path / "installed"))
    assert done.returncode == 0, done.stderr[-2000:]
    resumed = [json.loads(line) for line in (broken / "run" / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip(whole.metrics(), resumed, strict=True):
        for key in line.keys() - {"step_seconds", "data_wait"}:
            assert other[key] == line[key], key
    first, second = weights(whole.folder / "model"), weights(broken / "run" / "model")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_equal_one(tmp_path: Path, shared_corpus: Path) -> None:
    """In float64, to 1e-9: losses, metrics, the weights they lead to; uneven shares, text-only samples."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / f"{processes}"
        content = recipe(folder, shared_corpus, 4, precision={"compute": "fp64", "teachers": "fp64"})
        content["objectives"]["ross"] |= {"mask_padding": True, "prediction": "v"}
        content["stages"][0] |= {"batch_size": 5}
        path = write_recipe(folder, content)
        if processes == 1:
            train(load_recipe(path), display=Display(quiet=True))
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "foveate"]
            command = [sys.executable, *launcher, "train", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment(folder / "installed"))
            assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        found.append((lines, weights(folder / "run" / "model")))
    (lines, one), (others, two) = found
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys() and "loss/through" in line
        for key in line.keys() - {"stage", "step_seconds", "data_wait"}:
            assert other[key] == pytest.approx(line[key], rel=1e-9, abs=1e-12), key
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-9, rtol=1e-9)


def test_pictures_of_a_finished_run(tmp_path: Path, shared_corpus: Path, foveate_command: Command) -> None:
    """`foveate show`, with the recipe's steps and with others; what `--set` gets wrong is told."""
    path = write_recipe(tmp_path, recipe(tmp_path, shared_corpus))
    run = train(load_recipe(path), display=Display(quiet=True)).folder
    picture = tmp_path / "A.png"
    values = np.random.default_rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(values).save(picture)

    def shown(*words: object) -> list[np.ndarray]:
        status, told, errors = foveate_command("show", run, "--images", picture, "--out", tmp_path / "out", *words)
        assert status == 0, errors
        return [np.asarray(Image.open(path)).astype(int) for path in told.split()]

    own, again = shown(), shown()
    assert len(own) == 2 and all(np.array_equal(*pair) for pair in zip(own, again, strict=True))
    steps, sampler = (f"objectives.ross.sampling.{change}" for change in ("steps=9", "sampler=ddpm"))
    for words in (("--set", steps), ("--set", sampler), ("--seed", 7)):
        other = shown(*words)
        assert not np.array_equal(other[0], own[0]) and np.array_equal(other[1], own[1]), words
    for wrong, problem in {
        "seed=3": "only options of objectives change pictures",
        "objectives.ross.sampling.stepz=3": "unknown key 'stepz' These changes do not go with it.",
        "objectives.ross.sampling.steps=0": "must be greater than 0",
    }.items():
        status, _, errors = foveate_command("show", run, "--images", picture, "--set", wrong)
        assert status == 2 and problem in " ".join(errors.split()), errors
