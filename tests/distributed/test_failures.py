"""Whatever ends one process ends all, soon, with one message; the run goes on from its last checkpoint."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from foveate.errors import RunError, UserError
from foveate.processes import launched, together
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.session import StopRequest
from foveate.training import train
from tests.corpus import write_corpus
from tests.distributed.launching import accelerate, by_hand, environment, left, torchrun, trained, write


def trap(sample: str, deed: str) -> dict[str, Any]:
    return {"trap": {"sample": sample, "deed": deed}}


@pytest.mark.parametrize(
    ("deed", "statuses", "words"),
    [
        ("die", {-9, 1}, "is gone: killed (out of memory?)"),
        ("leave", {7, 1}, "is gone: killed (out of memory?)"),
        ("raise", {2}, "objective 'trap' failed in tests.distributed.traps.Trap.loss: RuntimeError: the trap has"),
        ("nan", {1}, "the loss of 'trap' is not finite in stage only, step "),
        ("statistics", {2}, "objective 'trap': 1 of 2 processes report the statistics 'seen'"),
    ],
)
def test_one_process_fails(tmp_path: Path, shared_corpus: Path, deed: str, statuses: set[int], words: str) -> None:
    """In the loss of one sample, which is one process's; nothing but foveate joins the processes."""
    recipe = write(
        tmp_path / "one", shared_corpus, [{"max_steps": 16}], objectives=trap("one7", deed), checkpoint_every=1,
        hardware={"workers": int(deed == "die")},  # which outlives it, with copies of its connections
    )  # fmt: skip
    ended = by_hand(2, recipe)
    assert set(ended.statuses) == statuses, ended.words
    [error] = ended.errors
    assert words in error
    assert deed != "nan" or "one7" in error
    run = recipe.parent / "run"
    steps = sorted(int(path.name[5:]) for path in (run / "only" / "checkpoints").glob("step-*"))
    assert 0 < steps[-1] < 16, "an epoch has 16 steps: the sample came in one of them"


def test_the_main_process_fails_while_the_others_wait(tmp_path: Path, shared_corpus: Path) -> None:
    """Its disk is full when it writes a checkpoint."""
    recipe = write(tmp_path / "full", shared_corpus, [{"max_steps": 4}], objectives={}, checkpoint_every=1)

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ended = by_hand(2, recipe, prepare={0: small_disk})
    assert ended.statuses == [2, 2], ended.words
    [error] = ended.errors
    assert "cannot be written" in error and "File too large" in error and "Free space" in error


def test_data_that_only_one_process_finds_defective(tmp_path: Path, shared_corpus: Path) -> None:
    """A picture that is broken and was not checked: only the process that is to show it opens it."""
    corpus = write_corpus(tmp_path / "corpus")
    for picture in (corpus / "images").iterdir():
        if int(picture.stem) > 20:
            picture.write_bytes(b"no picture")
    recipe = write(tmp_path / "bad", corpus, [{"max_steps": 16, "check_samples": 0}], objectives={})
    ended = by_hand(3, recipe)
    assert ended.statuses == [2, 2, 2], ended.words
    [error] = ended.errors
    assert "foveate data check" in error


def test_a_wrong_recipe_is_told_once(tmp_path: Path, shared_corpus: Path) -> None:
    recipe = write(tmp_path / "wrong", shared_corpus, [{"batch_siez": 3}])
    ended = by_hand(2, recipe)
    assert ended.statuses == [2, 2], ended.words
    assert len(ended.errors) == 1 and sum("batch_siez" in words for words in ended.words) == 1


def test_signals_leave_a_checkpoint(tmp_path: Path, shared_corpus: Path) -> None:
    """To the launcher, which hands them on to its workers' process groups, where those that load data are too."""
    recipe = write(
        tmp_path / "stop", shared_corpus, [{"max_steps": 200}], objectives={}, log_every=1, hardware={"workers": 1}
    )
    for launcher, number in ((torchrun(2), signal.SIGTERM), (accelerate(2), signal.SIGINT)):
        process = subprocess.Popen(
            [*launcher, "-m", "foveate", "train", str(recipe), "--resume"], text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(tmp_path / "installed"),
        )  # fmt: skip
        try:
            assert process.stderr is not None
            words = ""
            while "ETA" not in words and (line := process.stderr.readline()):  # until a step is done
                words += line
            process.send_signal(number)
            words += process.communicate(timeout=120)[1]
        finally:
            process.kill()
        assert words.count("stopped after step") == 1, words
        step = int(words.partition("stopped after step ")[2].split()[0])
        lines, _ = left(recipe.parent / "run")
        assert len(lines) == step < 200
        assert (recipe.parent / "run" / "only" / "checkpoints" / f"step-{step}").is_dir()


def test_a_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, it comes from a launcher that hands on what all have got; later, from somebody who will not wait."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 4)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_folder_in_which_somebody_trains(tmp_path: Path, shared_corpus: Path) -> None:
    """As where a scheduler starts the same command several times, and none of them knows of the others."""
    recipe = write(tmp_path / "both", shared_corpus, [{"max_steps": 4}], objectives={})
    first = subprocess.Popen(
        [sys.executable, "-m", "foveate", "train", str(recipe)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env=environment(tmp_path / "installed") | {"FOVEATE_TEST_SIGNAL": "SIGSTOP only/2"},
    )  # fmt: skip
    os.waitpid(first.pid, os.WUNTRACED)  # until it has stopped itself
    try:
        with pytest.raises(RunError, match="another process trains in"):
            train(load_recipe(recipe), resume=True, display=Display(quiet=True))
    finally:
        first.kill()
        first.wait()
    train(load_recipe(recipe), resume=True, display=Display(quiet=True))


def test_processes_that_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState()  # of a process of its own
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert launched() == 3
    with pytest.raises(UserError, match=r"launched as 3 processes, and each .* would train alone"), together():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with together():
        assert launched() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_what_accelerate_cannot_change(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name), together():
        pass


def test_others_that_never_come(tmp_path: Path, shared_corpus: Path) -> None:
    recipe = write(tmp_path / "alone", shared_corpus)
    done = trained([sys.executable], recipe, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert done.returncode == 1
    assert "process 0 of 2 has not met the others" in done.stderr and "torchrun" in done.stderr
