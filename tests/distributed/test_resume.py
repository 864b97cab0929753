"""A run that is stopped and goes on with another number of processes equals the unbroken one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.session import Interrupted
from foveate.training import train
from tests.distributed.launching import assert_equal, by_hand, environment, torchrun, trained, write
from tests.distributions import on_path

STAGES = [{"name": "first", "max_steps": 20}, {"name": "second", "max_steps": 6}]
"""An epoch has 16 steps."""


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """The tests' plugins in this process, where runs of one process are trained."""
    environment(tmp_path / "installed")
    with on_path(tmp_path / "installed"):
        yield


def train_here(path: Path, resume: bool = False) -> None:
    train(load_recipe(path), resume=resume, display=Display(quiet=True))


def test_stopped_and_resumed_with_other_numbers_of_processes(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    """1 process, 2, 1, 2, 1: stopped inside an epoch, inside the next, killed between the stages, and in the second."""
    whole, broken = (write(tmp_path / name, shared_corpus, STAGES, checkpoint_every=4) for name in ("whole", "broken"))
    train_here(whole)
    run = broken.parent / "run"

    monkeypatch.setenv("FOVEATE_TEST_SIGNAL", "SIGTERM first/5")
    with pytest.raises(Interrupted, match="after step 6"):
        train_here(broken)
    stopped = trained(torchrun(2), broken, "--resume", FOVEATE_TEST_SIGNAL="SIGTERM first/17")
    assert stopped.returncode != 0 and (run / "first" / "checkpoints" / "step-18").is_dir(), stopped.stderr
    killed = trained(torchrun(1), broken, "--resume", FOVEATE_TEST_SIGNAL="SIGKILL first finished")
    assert killed.returncode == -signal.SIGKILL and not (run / "second").exists(), killed.stderr
    ended = by_hand(2, broken, "--resume", FOVEATE_TEST_SIGNAL="SIGKILL second/5")
    assert ended.statuses == [-signal.SIGKILL, 1], ended.words
    assert (run / "second" / "checkpoints" / "step-4").is_dir()
    monkeypatch.delenv("FOVEATE_TEST_SIGNAL")
    train_here(broken, resume=True)
    assert_equal(whole.parent / "run", run)


def test_dropout_draws_after_a_resume_what_it_would_have_drawn(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    """Masks come from torch's global generator, whose state is in no checkpoint."""
    stage = {"max_steps": 6, "train": {"projector": 1e-3, "llm": {"lr": 1e-2, "lora": {"r": 4, "dropout": 0.5}}}}
    names = ("whole", "broken")
    whole, broken = (write(tmp_path / name, shared_corpus, [stage], objectives={}) for name in names)
    train_here(whole)
    monkeypatch.setenv("FOVEATE_TEST_SIGNAL", "SIGTERM only/2")
    with pytest.raises(Interrupted, match="after step 3"):
        train_here(broken)
    monkeypatch.delenv("FOVEATE_TEST_SIGNAL")
    train_here(broken, resume=True)
    assert_equal(whole.parent / "run", broken.parent / "run", gap=0.0)
