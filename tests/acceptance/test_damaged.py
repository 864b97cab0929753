"""Full and read-only disks, flipped bytes, missing files: one clear error, what was whole stays, the way on works."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import foveate.cli
from foveate import hookimpl
from foveate.checkpoint import load_checkpoint
from foveate.errors import FoveateError, RunError
from foveate.plugins import installed_plugins
from foveate.run import Run
from tests import objectives_plugin
from tests.corpus import recipe_dict, write_recipe
from tests.objectives_plugin import environment

Command = Callable[..., tuple[int, str, str]]
STEPS, EVERY = 6, 2
CHECKPOINT = {"complete.json", "model.safetensors", "objectives.safetensors", "optimizer.safetensors", "state.json"}
TEACHER = {"complete.json", "encoder.safetensors", "fit.json", "weights.safetensors"}
OF_TIME = {"step_seconds", "data_wait"}


class Damage:
    """A plugin that does what the variable `DAMAGE` says (`fill@3`) after a step of training."""

    HOOK_API = 1

    @hookimpl
    def step_finished(self, run: Run, step: int) -> None:
        name, _, when = os.environ.get("DAMAGE", "").partition("@")
        if name and step == int(when):
            getattr(self, name)(run.folder)

    def stop(self, folder: Path) -> None:
        raise FoveateError("stopped")

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder)

    def fill(self, folder: Path) -> None:
        """Leaves room for lines of metrics, not for a checkpoint."""
        free = shutil.disk_usage(folder).free
        (folder.parent / "filler").write_bytes(b"\0" * max(0, free - 5 * 4096))

    def make_read_only(self, folder: Path) -> None:
        subprocess.run(["mount", "--bind", folder.parent, folder.parent], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder.parent], check=True)

    def put_full_device(self, folder: Path) -> None:
        (folder / "metrics.jsonl").rename(folder.parent / "metrics.jsonl")
        (folder / "metrics.jsonl").symlink_to("/dev/full")


DAMAGE = Damage()


def recipe(folder: Path, corpus: Path, **changes: Any) -> Path:
    """Six steps, a checkpoint after every second; an objective whose teacher is fitted and reads a trained encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = recipe_dict(corpus)["stages"][0]
    stage = {**base, "train": {**base["train"], "queries": 1e-3}, "max_steps": STEPS, "batch_size": 6}
    objectives = {"queries": {"fit": True, "encoder": True}}
    content = recipe_dict(corpus, output=str(folder / "run"), objectives=objectives, stages=[stage])
    return write_recipe(folder, {**content, "checkpoint_every": EVERY, **changes})


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Iterator[None]:
    """The objectives of tests, and `Damage`, as if they were installed."""
    installed_plugins.cache_clear()
    installed_plugins().add(objectives_plugin, "test-objectives (tests)")
    installed_plugins().add(DAMAGE, "test-damage (tests)")
    yield
    installed_plugins.cache_clear()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Path:
    """`whole/run`, which has finished, and `stopped/run`, the same run stopped after step 5: two checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, damage in (("whole", ""), ("stopped", "stop@5")):
            patch.setenv("DAMAGE", damage)
            with pytest.raises(SystemExit) as leaving:
                foveate.cli.main(["train", str(recipe(root / name, shared_corpus))])
            assert leaving.value.code == bool(damage)
    return root


@pytest.fixture
def refused(foveate_command: Command) -> Callable[..., str]:
    """Runs a command that must fail with one paragraph; returns it."""

    def run(*words: object) -> str:
        status, _, err = foveate_command(*words)
        return the_error(status, err)

    return run


def the_error(status: int, err: str) -> str:
    assert status in (1, 2), err
    assert err.count("error: ") == 1 and "Traceback" not in err and "not foreseen" not in err
    message = err[err.index("error: ") + 7 :].strip()
    assert "\n" not in message, "one paragraph"
    return message


@pytest.fixture
def stopped(runs: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, to be damaged."""
    shutil.copytree(runs / "stopped", tmp_path / "stopped")
    return tmp_path / "stopped" / "run"


@pytest.fixture
def finished(runs: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(runs / "whole", tmp_path / "whole")
    return tmp_path / "whole" / "run"


@pytest.fixture
def goes_on(foveate_command: Command, runs: Path) -> Callable[[Path], None]:
    """Resumes a run, which must end as the unbroken one did, bit by bit."""

    def resume(run: Path) -> None:
        status, _, err = foveate_command(*resumed(run))
        assert status == 0, err
        same_end(run, runs / "whole" / "run")

    return resume


def resumed(run: Path) -> list[object]:
    return ["train", run.parent / "recipe.yaml", "--resume", "--set", f"output={run}"]


def lines(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in found]


def same_end(run: Path, other: Path) -> None:
    assert lines((run / "metrics.jsonl").read_text()) == lines((other / "metrics.jsonl").read_text())
    weights = [path.relative_to(other) for path in sorted((other / "model").rglob("*.safetensors"))]
    assert weights and all((run / path).read_bytes() == (other / path).read_bytes() for path in weights)


def tree(folder: Path) -> dict[str, str]:
    """Relative path → hash of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, at: float = 0.6) -> None:
    """Turns one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Checkpoints


@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_a_flipped_byte_in_a_checkpoint_is_told_and_the_one_before_it_is_whole(
    name: str, stopped: Path, refused: Callable[..., str]
) -> None:
    newest, before = (stopped / "only" / "checkpoints" / f"step-{step}" for step in (4, 2))
    assert names(newest) == names(before) == CHECKPOINT
    intact = tree(before)
    flip(newest / name)
    message = refused(*resumed(stopped))
    assert str(newest / name) in message or name == "complete.json"  # a byte of it may say another file is damaged
    assert str(newest) in message and ("damaged" in message or "cannot be read" in message)
    assert f"Delete {newest}: --resume then goes on from the checkpoint before it, step-2." in message
    assert tree(before) == intact and load_checkpoint(before).state["step"] == 2


@pytest.mark.parametrize("name", sorted(CHECKPOINT - {"complete.json"}))
def test_a_missing_file_of_a_checkpoint_is_told(name: str, stopped: Path, refused: Callable[..., str]) -> None:
    newest = stopped / "only" / "checkpoints" / "step-4"
    (newest / name).unlink()
    message = refused(*resumed(stopped))
    assert f"{newest / name} cannot be read: No such file" in message and f"Delete {newest}:" in message


def test_deleting_what_the_message_says_goes_on_from_the_checkpoint_before(
    stopped: Path, refused: Callable[..., str], goes_on: Callable[[Path], None]
) -> None:
    newest = stopped / "only" / "checkpoints" / "step-4"
    (newest / "state.json").write_bytes((newest / "state.json").read_bytes()[:-30])
    message = refused(*resumed(stopped))
    assert f"{newest / 'state.json'} is damaged" in message
    shutil.rmtree(newest)
    goes_on(stopped)


def test_a_checkpoint_without_its_seal_was_never_complete(stopped: Path, goes_on: Callable[[Path], None]) -> None:
    (stopped / "only" / "checkpoints" / "step-4" / "complete.json").unlink()
    goes_on(stopped)


def test_without_an_earlier_checkpoint_the_run_begins_anew(
    stopped: Path, refused: Callable[..., str], goes_on: Callable[[Path], None]
) -> None:
    checkpoints = stopped / "only" / "checkpoints"
    shutil.rmtree(checkpoints / "step-2")
    flip(checkpoints / "step-4" / "optimizer.safetensors")
    message = refused(*resumed(stopped))
    assert f"Delete {checkpoints / 'step-4'}: --resume then goes on from what is before it, or from" in message
    shutil.rmtree(checkpoints / "step-4")
    goes_on(stopped)


def test_every_damage_of_a_checkpoint_is_found_wherever_it_is(stopped: Path) -> None:
    folder, drawn = stopped / "only" / "checkpoints" / "step-4", random.Random(4)
    for number in range(120):
        path = folder / sorted(CHECKPOINT)[number % len(CHECKPOINT)]
        before = path.read_bytes()
        kind = drawn.choice(["flip", "flip", "cut", "grow", "empty"])
        if kind == "flip":
            flip(path, drawn.random())
        else:
            cut = before[: drawn.randrange(len(before))]
            path.write_bytes({"cut": cut, "grow": before + b"\0", "empty": b""}[kind])
        with pytest.raises(RunError, match="step-4") as caught:
            load_checkpoint(folder)
        assert "Delete" in str(caught.value)
        path.write_bytes(before)
    assert load_checkpoint(folder).state["step"] == 4


# The model and the fitted teachers


def test_a_damaged_model_is_told_by_every_command_that_reads_it(
    finished: Path, refused: Callable[..., str], foveate_command: Command, shared_corpus: Path, tmp_path: Path
) -> None:
    model, intact = finished / "model", tree(finished / "model")
    assert {"complete.json", "foveate.json", "model.safetensors", "tokenizer.json"} < intact.keys()
    assert "objectives/queries/weights.safetensors" in intact
    from_it = recipe(tmp_path / "next", shared_corpus, model={"from": str(finished)})
    commands: list[tuple[object, ...]] = [
        ("show", finished, "--data"), ("export", finished, tmp_path / "out"), ("plan", from_it), ("train", from_it),
    ]  # fmt: skip
    for name in intact:
        for harm in (flip, Path.unlink):
            whole = (model / name).read_bytes()
            harm(model / name)
            for words in commands:
                if name == "complete.json" and harm is Path.unlink:
                    continue  # whoever changes a model on purpose deletes the seal, as the message says
                message = refused(*words)
                if name == "foveate.json" and harm is Path.unlink:  # then it is no model
                    assert "has no model yet" in message or "foveate.json" in message
                    continue
                assert str(model) in message and (name in message or name == "complete.json"), message
                assert "Restore it from a copy" in message and "--resume" in message
            (model / name).write_bytes(whole)
    assert not (tmp_path / "out").exists() and not (tmp_path / "next" / "run").exists()
    (model / "complete.json").unlink()
    assert foveate_command("export", finished, tmp_path / "out", "--no-check")[0] == 0


def test_without_a_seal_what_cannot_be_read_is_still_told(finished: Path, refused: Callable[..., str]) -> None:
    """A model that somebody has changed on purpose."""
    model = finished / "model"
    (model / "complete.json").unlink()
    for name, content in (
        ("foveate.json", b"{"), ("foveate.json", b"[]"), ("foveate.json", b'{"parts": {"llm": {"type": "hf"}}}'),
        ("foveate.json", b'{"parts": {"llm": {"type": "gone", "options": {}}}}'), ("model.safetensors", b"\0" * 99),
        ("foveate.json", b'{"parts": {"encoder": {"type": "hf", "options": {"config": 3}}}}'),
        ("foveate.json", b'{"parts": {}}'), ("objectives/queries/weights.safetensors", b"{}"), ("tokenizer.json", b"{"),
    ):  # fmt: skip
        whole = (model / name).read_bytes()
        (model / name).write_bytes(content)
        words = ["export", finished, finished.parent / "out"] if "token" in name else ["show", finished, "--data"]
        message = refused(*words)
        assert str(model) in message, message
        (model / name).write_bytes(whole)


def test_a_deleted_model_is_written_again(
    finished: Path, refused: Callable[..., str], goes_on: Callable[[Path], None], foveate_command: Command
) -> None:
    flip(finished / "model" / "model.safetensors")
    message = refused("export", finished, finished.parent / "out")
    assert f"delete {finished / 'model'}, and `foveate train {finished / 'recipe.yaml'} --resume` writes it" in message
    shutil.rmtree(finished / "model")
    assert "has no model yet" in refused("export", finished, finished.parent / "out")
    goes_on(finished)
    status, _, err = foveate_command("export", finished, finished.parent / "out", "--no-check")
    assert status == 0, err


@pytest.mark.parametrize("name", sorted(TEACHER))
def test_a_damaged_teacher_is_told(name: str, stopped: Path, finished: Path, refused: Callable[..., str]) -> None:
    for run, words in ((stopped, resumed(stopped)), (finished, ["show", finished, "--data"])):
        folder = run / "teachers" / "queries"
        assert names(folder) == TEACHER
        whole = (folder / name).read_bytes()
        for harm in (flip, Path.unlink):
            harm(folder / name)
            message = refused(*words)
            assert str(folder) in message and (name in message or name == "complete.json"), message
            assert f"Restore it from a copy; or delete {folder}" in message
            (folder / name).write_bytes(whole)


# What else is in the folder of a run


def test_a_damaged_line_of_metrics_is_named(
    stopped: Path, refused: Callable[..., str], goes_on: Callable[[Path], None]
) -> None:
    path = stopped / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    for bad in (b"{\n", b"\xff\n", b"[]\n", b"3\n", whole[1][:40] + b"\n", whole[1].replace(b'"step"', b'"stop"')):
        path.write_bytes(b"".join([whole[0], bad, *whole[2:]]))
        assert f"{path}:2 is damaged" in refused(*resumed(stopped))
    path.write_bytes(b"".join(whole)[:-7])  # as a crash leaves it
    goes_on(stopped)


def test_flipped_bytes_of_recipe_and_manifest_end_no_command_with_a_traceback(
    stopped: Path, finished: Path, foveate_command: Command
) -> None:
    drawn, refusals = random.Random(8), 0
    for number in range(24):
        run, name = (finished, stopped)[number % 2], ("recipe.yaml", "manifest.json")[number // 2 % 2]
        words = ["show", run, "--data"] if run == finished else resumed(run)
        shutil.copytree(run, run.parent / "copy")
        flip(run / name, drawn.random()) if number > 7 else (run / name).write_bytes(
            (b"", b"\xff\x00", b"[]", b"{")[number // 2 % 4]
        )
        status, _, err = foveate_command(*words)
        if status and "nothing was drawn" not in err:
            refusals += 1
            assert status == 2 and "Traceback" not in err and "not foreseen" not in err, (words, err)
            assert name in err or str(run) in err
        shutil.rmtree(run)
        (run.parent / "copy").rename(run)
    assert refusals > 8


def test_a_run_whose_folder_is_removed_ends_with_an_error(
    tmp_path: Path, shared_corpus: Path, refused: Callable[..., str], goes_on: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DAMAGE", "remove@3")
    path = recipe(tmp_path, shared_corpus)
    message = refused("train", path)
    assert f"{tmp_path / 'run' / 'metrics.jsonl'} cannot be written: No such file" in message
    monkeypatch.delenv("DAMAGE")
    goes_on(tmp_path / "run")


def test_metrics_that_cannot_be_written_end_the_run_and_it_goes_on(
    tmp_path: Path, shared_corpus: Path, refused: Callable[..., str], goes_on: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DAMAGE", "put_full_device@3")
    message = refused("train", recipe(tmp_path, shared_corpus))
    run = tmp_path / "run"
    assert f"{run / 'metrics.jsonl'} cannot be written: No space left on device. Free space" in message
    monkeypatch.delenv("DAMAGE")
    (tmp_path / "metrics.jsonl").replace(run / "metrics.jsonl")
    goes_on(run)


def test_a_run_below_a_file_is_refused(tmp_path: Path, shared_corpus: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refused("train", recipe(tmp_path, shared_corpus), "--set", f"output={tmp_path / 'file' / 'run'}")
    assert f"{tmp_path / 'file' / 'run'}" in message


# Disks that are full or read-only: a file system of its own, in namespaces of its own


LIMITED = """
import resource, sys
from foveate.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(sys.argv[2:])
"""


def installed(folder: Path) -> dict[str, str]:
    """Variables of a process in which the plugins of this test are installed."""
    variables = environment(folder)
    points = folder / "foveate_test_objectives-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "test_damage = tests.acceptance.test_damaged:DAMAGE\n")
    return variables


def test_a_checkpoint_beyond_what_a_file_may_hold_leaves_the_one_before(
    runs: Path, stopped: Path, goes_on: Callable[[Path], None]
) -> None:
    """A limit of the kernel on the size of files: the error that writing then is comes from it, as on a full disk."""
    checkpoints = stopped / "only" / "checkpoints"
    size = max(path.stat().st_size for path in checkpoints.rglob("*"))
    before = tree(checkpoints)
    words = [sys.executable, "-c", LIMITED, str(size - 1000), *map(str, resumed(stopped))]
    variables = installed(stopped.parent / "installed")
    done = subprocess.run(words, capture_output=True, text=True, env=variables, stdin=subprocess.DEVNULL)
    message = the_error(done.returncode, done.stderr)
    assert f"{checkpoints / 'step-6'} cannot be written: File too large" in message
    assert tree(checkpoints) == before
    goes_on(stopped)


STEPS_ON_A_DISK = """
import hashlib, json, os, pathlib, subprocess, sys
import foveate.cli, foveate.training  # once for all commands
work = json.loads(sys.stdin.read())
disk = pathlib.Path(work["disk"])
subprocess.run(["mount", "-t", "tmpfs", "-o", work["options"], "tmpfs", disk], check=True)
found = []
for do in work["steps"]:
    if do[0] == "foveate":
        read, write = os.pipe()
        if not (child := os.fork()):
            os.environ["DAMAGE"] = do[1]
            os.dup2(write, 2), os.dup2(os.open(os.devnull, os.O_RDWR), 1), os.close(read), os.close(write)
            try:
                foveate.cli.main(do[2:])
            except SystemExit as leaving:
                sys.stderr.flush()
                os._exit(leaving.code)
        os.close(write)
        with open(read) as said:
            err = said.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        files = [path for path in sorted(disk.rglob("*")) if path.is_file()]
        hashes = {str(path.relative_to(disk)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        metrics = disk / "run" / "metrics.jsonl"
        text = metrics.read_text() if metrics.is_file() else ""
        found.append({"status": status, "err": err, "tree": hashes, "metrics": text})
    elif do[0] == "free":
        (disk / "filler").unlink()
    else:
        subprocess.run(do, check=True)
print(json.dumps(found))
"""


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs steps on a file system in memory that only they see; returns what each command left. Linux only."""
    namespaces = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = f"mount -t tmpfs tmpfs {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*namespaces, "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system in a namespace")

    def run(options: str, *steps: list[str]) -> list[dict[str, Any]]:
        (tmp_path / "disk").mkdir()
        work = {"disk": str(tmp_path / "disk"), "options": options, "steps": steps}
        command, variables = [*namespaces, sys.executable, "-c", STEPS_ON_A_DISK], installed(tmp_path / "installed")
        done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return run


def below(files: dict[str, str], folder: str) -> dict[str, str]:
    return {name: content for name, content in files.items() if name.startswith(f"run/{folder}")}


def ended_as(found: dict[str, Any], run: Path) -> None:
    """What a command left on the disk is the end of `run`."""
    assert found["status"] == 0, found["err"]
    assert lines(found["metrics"]) == lines((run / "metrics.jsonl").read_text())
    weights = {f"run/{name}": content for name, content in tree(run).items() if name.startswith("model/")}
    weights = {name: content for name, content in weights.items() if name.endswith(".safetensors")}
    assert weights and weights.items() <= found["tree"].items()


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_the_run_goes_on(
    on_disk: Callable[..., Any], tmp_path: Path, shared_corpus: Path, runs: Path
) -> None:
    train = ["train", str(recipe(tmp_path, shared_corpus, output=str(tmp_path / "disk" / "run")))]
    full, again, free = on_disk(
        "size=64m", ["foveate", "fill@3", *train], ["foveate", "", *train, "--resume"], ["free"],
        ["foveate", "", *train, "--resume"],
    )  # fmt: skip
    message = the_error(full["status"], full["err"])
    assert f"{tmp_path / 'disk' / 'run' / 'only' / 'checkpoints' / 'step-4'} cannot be written: No space" in message
    assert "Free space" in message
    kept = below(full["tree"], "only/checkpoints")
    assert {name.split("/")[3] for name in kept} >= {"step-2"} and not any("step-4" in name for name in kept)
    assert "cannot be written: No space" in the_error(again["status"], again["err"])
    step_2 = below(full["tree"], "only/checkpoints/step-2")
    assert len(step_2) == len(CHECKPOINT) and below(again["tree"], "only/checkpoints/step-2") == step_2
    ended_as(free, runs / "whole" / "run")


def test_a_disk_that_becomes_read_only_ends_the_run_and_it_goes_on(
    on_disk: Callable[..., Any], tmp_path: Path, shared_corpus: Path, runs: Path
) -> None:
    disk = tmp_path / "disk"
    train = ["train", str(recipe(tmp_path, shared_corpus, output=str(disk / "run")))]
    failed, still, writable = on_disk(
        "size=64m", ["foveate", "make_read_only@3", *train], ["foveate", "", *train, "--resume"],
        ["umount", str(disk)], ["foveate", "", *train, "--resume"],
    )  # fmt: skip
    assert "metrics.jsonl cannot be written: Read-only file system" in the_error(failed["status"], failed["err"])
    assert "Read-only file system" in the_error(still["status"], still["err"])
    assert still["tree"] == failed["tree"]
    ended_as(writable, runs / "whole" / "run")


def test_a_read_only_folder_and_a_disk_without_room_are_found_before_the_first_step(
    on_disk: Callable[..., Any], tmp_path: Path, shared_corpus: Path
) -> None:
    disk = tmp_path / "disk"
    train = ["train", str(recipe(tmp_path, shared_corpus, output=str(disk / "run")))]
    read_only, small = on_disk(
        "size=200k,ro", ["foveate", "", *train], ["mount", "-o", "remount,rw", str(disk)], ["foveate", "", *train]
    )
    assert str(disk / "run") in (message := the_error(read_only["status"], read_only["err"]))
    assert "Read-only file system" in message and read_only["tree"] == {}
    assert str(disk / "run") in (message := the_error(small["status"], small["err"]))
    assert "No space left on device" in message and small["metrics"] == ""


def test_a_disk_that_is_full_when_the_model_is_written(
    on_disk: Callable[..., Any], tmp_path: Path, shared_corpus: Path, runs: Path
) -> None:
    output = {"output": str(tmp_path / "disk" / "run"), "checkpoint_every": None}
    train = ["train", str(recipe(tmp_path, shared_corpus, **output))]
    size = sum(path.stat().st_size for path in (runs / "whole" / "run" / "model").rglob("*") if path.is_file())
    room = ["sh", "-c", f"head -c {2 * size} /dev/zero > {tmp_path / 'disk' / 'filler'}"]
    full, free = on_disk("size=1500k", room, ["foveate", "", *train], ["free"], ["foveate", "", *train, "--resume"])
    assert "No space left on device" in the_error(full["status"], full["err"])
    assert not below(full["tree"], "model")
    ended_as(free, runs / "whole" / "run")
