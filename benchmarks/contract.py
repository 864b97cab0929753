"""What the contract costs: time of core's calls around objectives ÷ time of a step, at the size of the digits recipe.

    python benchmarks/contract.py [STEPS [THREADS]]

Trains the first stage of examples/digits.yaml without an objective (what the loop does anyway), with the template's
(`examples/plugin_template`), then with two more: one edits the visual tokens, one reads three shifted layers.
`machinery` is the time of core's calls around them, without what these call of the model and of the objectives: who
takes part, reads, taps and edits around the LLM, outputs, targets, sums and metrics, hooks after a step. `gathering`
copies the rows of states, which any implementation must.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "plugin_template")]

from foveate_align.objective import AlignLoss  # noqa: E402

from foveate.forward_pass import ForwardPass  # noqa: E402
from foveate.learner import Learner  # noqa: E402
from foveate.model.language import TransformersLLM  # noqa: E402
from foveate.model.lmm import LMM  # noqa: E402
from foveate.objective import ObjectiveOptions, Outputs, VisionObjective  # noqa: E402
from foveate.plugins import Plugins  # noqa: E402
from foveate.progress import Display  # noqa: E402
from foveate.recipe_file import load_recipe  # noqa: E402
from foveate.stage import StageLoop  # noqa: E402
from foveate.tally import Tally  # noqa: E402
from foveate.training import train  # noqa: E402
from tests.objectives import Masked, Noisy, plugins_with  # noqa: E402


class Clock:
    """Exclusive time of the functions it watches: what a watched function calls of another one counts there."""

    def __init__(self) -> None:
        self.spent = {"machinery": 0.0, "gathering": 0.0, "model": 0.0, "objectives": 0.0}
        self.steps: list[dict[str, float]] = []
        self.stack: list[str] = []
        self.since = 0.0

    def watch(self, owner: Any, name: str, kind: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn(kind)
            try:
                return inner(*args, **kwargs)
            finally:
                self.turn(None)

        setattr(owner, name, timed)

    def turn(self, kind: str | None) -> None:
        now = time.perf_counter()
        if self.stack:
            self.spent[self.stack[-1]] += now - self.since
        if kind is None:
            self.stack.pop()
        else:
            self.stack.append(kind)
        self.since = time.perf_counter()

    def count_steps(self) -> None:
        """Whole steps, and what was spent in each: optimizer step and log included."""
        take = StageLoop._take_step

        def step(*args: Any) -> Any:
            before, started = dict(self.spent), time.perf_counter()
            try:
                return take(*args)
            finally:
                spent = {kind: self.spent[kind] - before[kind] for kind in before}
                self.steps.append({**spent, "step": time.perf_counter() - started})

        StageLoop._take_step = step  # type: ignore[method-assign]


def watched(objectives: Mapping[str, type[VisionObjective]]) -> Clock:
    clock = Clock()
    for owner, names, kind in (
        (ForwardPass, ("__init__", "outputs", "targets"), "machinery"),
        (Learner, ("_loss",), "machinery"),
        (Outputs, ("states", "encoder_states", "on_visual_grid"), "gathering"),
        (ObjectiveOptions, ("takes_part",), "machinery"),
        (Tally, ("add", "values"), "machinery"),
        (StageLoop, ("_resting",), "machinery"),
        (LMM, ("see", "place"), "model"),
        (TransformersLLM, ("forward", "embed"), "model"),
    ):
        for name in names:
            clock.watch(owner, name, kind)
    for cls in objectives.values():
        for name in {"loss", "edit_visual_tokens", "after_step"} & vars(cls).keys():
            clock.watch(cls, name, "objectives")
    hook = pluggy.HookCaller.__call__

    def called(self: Any, **kwargs: Any) -> Any:
        clock.turn("machinery")
        try:
            return hook(self, **kwargs)
        finally:
            clock.turn(None)

    pluggy.HookCaller.__call__ = called  # type: ignore[method-assign]
    clock.count_steps()
    return clock


def main(steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    several = {"align": AlignLoss, "masked": Masked, "noisy": Noisy}
    clock = watched(several)
    for names in ([], ["align"], list(several)):
        clock.steps.clear()
        run(steps, threads, names, plugins_with(several))
        kept = clock.steps[len(clock.steps) // 10 :]
        share = {kind: statistics.median(entry[kind] / entry["step"] for entry in kept) for kind in clock.spent}
        typical = statistics.median(entry["step"] for entry in kept)
        print(f"{', '.join(names) or 'no objective'}: median step {1e3 * typical:.1f} ms, {len(kept)} steps; medians:")
        for kind, value in share.items():
            print(f"  {kind:10s} {100 * value:6.2f} %")


def run(steps: int, threads: int, names: Sequence[str], plugins: Plugins) -> None:
    """Train the first stage of examples/digits.yaml with some objectives."""
    options = {"align": "{}", "masked": "{wish: causal}", "noisy": "{shift: 1, layers: [-1, 1, 2]}"}
    parts = {"encoder": "1.5e-3", "projector": "1.5e-3", "llm": "1.5e-3", **dict.fromkeys(names, "1e-3")}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "contract.yaml"
        listed = "".join(f"  {name}: {options[name]}\n" for name in names)
        objectives = f"objectives:\n{listed}" if names else ""
        recipe.write_text(f"extends: {ROOT / 'examples' / 'digits.yaml'}\n{objectives}")
        changes = [
            f"output={folder}/run", "evaluate=null", "hardware.workers=0", f"hardware.threads={threads}",
            "stages.0.epochs=null", f"stages.0.max_steps={steps}",
            "stages.0.train={" + ", ".join(f"{part}: {rate}" for part, rate in parts.items()) + "}",
            "stages.1.epochs=null", "stages.1.max_steps=1", "stages.1.objectives=[]",
        ]  # fmt: skip
        train(load_recipe(recipe, changes, plugins=plugins), display=Display(quiet=True))


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(100, 2)[len(given) :])
