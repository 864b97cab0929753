"""The runs of a comparison: each is trained in a process of its own, unless it is there already."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

from foveate.errors import FoveateError, RunError
from foveate.loaded import MODEL
from foveate.run import RECIPE, Run
from foveate_lab.compare_results import EVALUATION, Result
from foveate_lab.compare_variants import Variant, differences, some

if TYPE_CHECKING:
    from foveate.progress import Display

INDIFFERENT = {"output", "hardware", "checkpoint_every", "gradients_every", "log_every", "trackers"}
"""Keys of a recipe that change neither what is learned nor what is evaluated."""


class Stopped(FoveateError):
    """Somebody asked for a stop; the run in training has written a checkpoint."""

    exit_code = 130


@dataclass(frozen=True)
class PlannedRun:
    """A run of a variant, which may be there already."""

    variant: Variant
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    def words(self) -> list[str]:
        """Of `foveate`: what trains it, or goes on with it."""
        output = json.dumps(str(self.folder), ensure_ascii=False)
        changes = [*self.variant.changes, f"seed={self.seed}", f"output={output}"]
        return ["train", str(self.variant.recipe), "--resume", *(word for text in changes for word in ("--set", text))]

    def changed(self) -> list[str]:
        """In what the recipe of the run that is there differs, but for keys that make no other model or numbers."""
        wanted = yaml.safe_load(yaml.safe_dump({**self.variant.resolved, "seed": self.seed}))
        recipes = (Run(self.folder).recipe(), wanted)
        before, after = ({key: recipe[key] for key in recipe if key not in INDIFFERENT} for recipe in recipes)
        return differences(before, after)

    def complete(self) -> bool:
        """Whether the folder holds a model that was trained and evaluated as this run is to be."""
        there = (self.folder / RECIPE, self.folder / MODEL, self.folder / EVALUATION)
        return all(path.exists() for path in there) and not self.changed()

    def check(self) -> None:
        """Raises `RunError` where the folder holds something that this run cannot go on with."""
        Run.check(self.folder, resume=True)
        changed = self.changed() if (self.folder / RECIPE).is_file() else []
        if changed := [text for text in changed if not text.startswith("evaluate")]:
            raise RunError(
                f"{self.folder} holds a run of another recipe ({some(changed)}). Give another --out, or delete that "
                f"run (rm -r {self.folder})."
            )


def train_all(runs: Sequence[PlannedRun], display: Display) -> dict[tuple[str, int], Result]:
    """Trains what is not complete, one run after the other; results by variant and seed. Raises `RunError`."""
    results: dict[tuple[str, int], Result] = {}
    data: dict[str, Any] = {}
    with _Stop() as stop:
        for number, run in enumerate(runs, 1):
            due = not run.complete()
            if due:
                display.say(f"training {run} ({number} of {len(runs)})")
                _train(run, stop)
            result = results[run.variant.name, run.seed] = Result.of(run.folder)
            seen, first = Run(run.folder).manifest()["data"], next(iter(results.values()))
            if seen != data.setdefault(run.variant.name, seen) or not result.same_questions(first):
                raise RunError(
                    f"{run.folder}: the data that it was trained or evaluated on are not those of the runs before it; "
                    "they have changed meanwhile. Restore them and delete the runs that have seen others."
                )
            if due:
                display.say(f"trained {run}: mean accuracy {result.mean:.2f} ({number} of {len(runs)})")
    return results


def _train(run: PlannedRun, stop: _Stop) -> None:
    (run.folder / EVALUATION).unlink(missing_ok=True)  # of another `evaluate`; or this run would seem complete at once
    status = stop.wait_for(run.words())
    if stop.asked or status == Stopped.exit_code:
        raise Stopped(f"stopped in {run.folder}; the same `foveate compare` goes on")
    if status:
        raise RunError(f"the run {run.folder} ({run}) has failed; its error stands above.")
    if not run.complete():
        raise RunError(f"{run.folder} is not the run that was asked for: {run.variant.recipe} was changed meanwhile.")


class _Stop:
    """Hands SIGINT and SIGTERM on to the run in training, which then writes a checkpoint and ends; and waits for it.

    A terminal sends them to both; the run takes what comes within seconds for one.
    """

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._child is not None:
            self._child.send_signal(number)

    def wait_for(self, words: Sequence[str]) -> int:
        """The exit status of `foveate` with these words, in a process of its own. Its tables are not shown."""
        with subprocess.Popen([sys.executable, "-m", "foveate", *words], stdout=subprocess.DEVNULL) as self._child:
            if self.asked:  # before there was a process to hand it on to
                self._child.send_signal(signal.SIGINT)
            status = self._child.wait()
        self._child = None
        return status
