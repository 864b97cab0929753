"""The folder of a run: recipe, manifest, `metrics.jsonl`, checkpoints, model. Only the main process writes it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from foveate.errors import RunError
from foveate.files import read_json, write_json, write_text
from foveate.plugins import installed_plugins

if TYPE_CHECKING:
    from foveate.recipe import Recipe

RECIPE, MANIFEST, METRICS = "recipe.yaml", "manifest.json", "metrics.jsonl"
_LIBRARIES = ("foveate", "torch", "transformers", "accelerate", "tokenizers", "timm", "peft", "safetensors", "numpy")
_MAY_CHANGE = {"output", "hardware", "checkpoint_every", "log_every", "trackers", "evaluate"}
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
        resolved, now = recipe.resolved(), datetime.now(UTC).isoformat(timespec="seconds")
        started, resumed = now, list[str]()
        if (run.folder / RECIPE).is_file():
            old = read_json(run.folder / MANIFEST)
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

    def recipe(self) -> Any:
        """The resolved recipe that the run was begun with."""
        return yaml.safe_load((self.folder / RECIPE).read_text(encoding="utf-8"))

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
            message = f"{self.folder / METRICS} cannot be written: {error.strerror}. Free space, then --resume."
            raise RunError(message) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that a crash has cut off is left out."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        return [json.loads(line) for line in lines[:-1]]

    def cut_metrics(self, stages: Sequence[str], stage: str, step: int) -> None:
        """Takes the lines after `step` of `stage` out of `metrics.jsonl`: a resumed run writes them again."""
        if self.main:
            until = (stages.index(stage), step)
            kept = [line for line in self.metrics() if (stages.index(line["stage"]), line["step"]) <= until]
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


def _unbegun(path: Path) -> bool:
    """What a run that was killed before its recipe was written has left."""
    return path.name in (MANIFEST, f".{MANIFEST}.tmp", f".{RECIPE}.tmp")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None or not value:
        return {prefix: value}
    return {key: leaf for name, item in pairs for key, leaf in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
