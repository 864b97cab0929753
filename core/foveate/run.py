"""The folder of a run: recipe, manifest, `metrics.jsonl`, checkpoints, model. Only the main process writes it."""

from __future__ import annotations

import fcntl
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from foveate.errors import RunError
from foveate.files import read_json, write_json, write_text
from foveate.plugins import installed_plugins

if TYPE_CHECKING:
    from foveate.recipe import Recipe

RECIPE, MANIFEST, METRICS = "recipe.yaml", "manifest.json", "metrics.jsonl"
_LIBRARIES = ("foveate", "torch", "transformers", "accelerate", "tokenizers", "timm", "peft", "safetensors", "numpy")
_LOCK = ".lock"
_locks: dict[Path, IO[str]] = {}
_MAY_CHANGE = {"output", "hardware", "checkpoint_every", "gradients_every", "log_every", "trackers", "evaluate"}
"""Keys of a recipe that change nothing of what is learned: a resumed run may have others."""


@dataclass(frozen=True)
class Run:
    """A run on disk. Every process holds one; only the one with `main` writes."""

    folder: Path
    main: bool = True

    @staticmethod
    def check(folder: Path, resume: bool) -> None:
        """Raises `RunError` when a new run would overwrite something, or what is to be resumed is not a run.

        Resuming what has not begun is fine: a job that restarts itself begins with the same command.
        """
        if not folder.exists() or (folder.is_dir() and all(_unbegun(path) for path in folder.iterdir())):
            return
        if not (folder / RECIPE).is_file():
            raise RunError(f"{folder} exists and is not a run. Give the run another `output` or `name`.")
        if not resume:
            raise RunError(
                f"{folder} holds a run already. Go on with it (--resume), give the new one another folder "
                f"(--set output=…, or another name), or delete it (rm -r {folder})."
            )

    @classmethod
    def start(cls, recipe: Recipe, data: Mapping[str, str], *, resume: bool = False, main: bool = True) -> Run:
        """The run of `recipe` in `recipe.output`; `data` are the fingerprints of its sources by name.

        Writes recipe and manifest on the main process. Raises `RunError` as `check` does, and when a resumed run was
        begun with another recipe or other data.
        """
        run = cls(recipe.output, main)
        if not main:
            return run
        cls.check(run.folder, resume)
        run._lock()
        resolved, now = recipe.resolved(), datetime.now(UTC).isoformat(timespec="seconds")
        started, resumed = now, list[str]()
        if (run.folder / RECIPE).is_file():
            old = run.manifest()
            run._refuse_changes("recipe", run.recipe(), resolved)
            run._refuse_changes("data", old["data"], data)
            started, resumed = old["started"], [*old["resumed"], now]
        plugins = [name for name, _ in installed_plugins().manager.list_name_plugin()]
        manifest = {
            "name": recipe.name,
            "started": started,
            "resumed": resumed,
            "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
            "plugins": {name: found.version for name, found in installed_plugins().sources.items() if name in plugins},
            "data": dict(data),
        }
        write_json(run.folder / MANIFEST, manifest)
        write_text(run.folder / RECIPE, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        return run

    def _lock(self) -> None:
        """The folder is this process's until `released`, or until it ends. Raises `RunError` where it is another's."""
        path = self.folder / _LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _locks.setdefault(path, path.open("a"))
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}. Make the folder writable.") from error
        try:
            fcntl.lockf(_locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RunError(
                f"another process trains in {self.folder}. If it was to train together with this one, launch them with "
                "torchrun (docs/distributed.md); else wait for it, or give this run another `output`."
            ) from error
        except OSError:  # a file system without locks
            return

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was begun with. Raises `RunError` where it is damaged."""
        path = self.folder / RECIPE
        try:
            return {"output": None, "objectives": {}, **yaml.safe_load(path.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path} cannot be read: {reason}. It is damaged: restore it from a copy.") from error

    def manifest(self) -> dict[str, Any]:
        """Versions, plugins, fingerprints of the data, and when it ran. Raises `RunError` where it is damaged."""
        found: dict[str, Any] = read_json(self.folder / MANIFEST)
        kinds = {"name": str, "started": str, "resumed": list, "versions": dict, "plugins": dict, "data": dict}
        try:
            damaged = [key for key, kind in kinds.items() if not isinstance(found[key], kind)]
            datetime.fromisoformat(found["started"])
        except (LookupError, TypeError, ValueError):
            damaged = list(kinds)
        if damaged:
            raise RunError(f"{self.folder / MANIFEST} is damaged ({', '.join(damaged)}): restore it from a copy.")
        return found

    def stage_folder(self, stage: str) -> Path:
        """Where a stage's checkpoints lie."""
        return self.folder / stage

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`, non-finite numbers as null. Raises `RunError` where the disk is full."""
        bad = {key: None for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        try:
            if self.main:
                with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, **bad}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.folder / METRICS} cannot be written: {error.strerror}. Free space, or make it writable; then "
                "--resume goes on from the last checkpoint."
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that a crash has cut off is left out. Raises `RunError` for damage."""
        path, lines = self.folder / METRICS, list[dict[str, Any]]()
        for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
            try:
                lines.append(json.loads(text))
                sound = isinstance(lines[-1]["stage"], str) and isinstance(lines[-1]["step"], int)
            except (ValueError, LookupError, TypeError):
                sound = False
            if not sound:
                raise RunError(f"{path}:{number} is damaged: no line of metrics. Mend or delete this line.")
        return lines

    def cut_metrics(self, stages: Sequence[str], stage: str, step: int) -> None:
        """Takes the lines after `step` of `stage` out of `metrics.jsonl`: a resumed run writes them again."""
        if self.main:
            reached = stages[: stages.index(stage)]
            past = [line for line in self.metrics() if line["stage"] in reached]
            kept = past + [line for line in self.metrics() if line["stage"] == stage and line["step"] <= step]
            write_text(self.folder / METRICS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def _refuse_changes(self, what: str, old: Any, new: Any) -> None:
        before, after = _flat(old), _flat(dict(new))
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if changed := [key for key in changed if what == "data" or key.split(".")[0] not in _MAY_CHANGE]:
            shown = "; ".join(f"{key}: {before.get(key)} → {after.get(key)}" for key in changed[:4])
            raise RunError(
                f"{self.folder} cannot be resumed: the {what} is not the one that it began with ({shown}; "
                f"{len(changed)} in all). Restore it, or start a new run."
            )


@contextmanager
def released(folder: Path) -> Iterator[None]:
    """Afterwards, however the block ends, other processes may go on with the run in `folder`."""
    try:
        yield
    finally:
        if file := _locks.pop(folder / _LOCK, None):
            file.close()


def _unbegun(path: Path) -> bool:
    """What a run that was killed before its recipe was written has left."""
    return path.name in (_LOCK, MANIFEST, f".{MANIFEST}.tmp", f".{RECIPE}.tmp")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None or not value:
        return {prefix: value}
    return {key: leaf for name, item in pairs for key, leaf in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
