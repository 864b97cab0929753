"""A plugin that makes runs fail: a signal at an event of the main process, or a bad deed at one sample, on its process.

`FOVEATE_TEST_SIGNAL="SIGTERM first/5"` sends it to the main process after step 5 of stage `first`; events are also
`first finished` and `first/5 saved`.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from foveate import LossTerm, ObjectiveContext, ObjectiveOptions, Outputs, Targets, VisionObjective, hookimpl
from foveate.hookspecs import Register

HOOK_API = 1


@hookimpl
def register_objectives(register: Register) -> None:
    register("trap", "tests.distributed.traps:Trap")


@hookimpl
def step_finished(stage: str, step: int) -> None:
    _happened(f"{stage}/{step}")


@hookimpl
def stage_finished(stage: str) -> None:
    _happened(f"{stage} finished")


@hookimpl
def checkpoint_saved(stage: str, step: int) -> None:
    _happened(f"{stage}/{step} saved")


def _happened(event: str) -> None:
    name, _, when = os.environ.get("FOVEATE_TEST_SIGNAL", "").partition(" ")
    if event == when:
        os.kill(os.getpid(), signal.Signals[name])


class Trap(VisionObjective):
    """Harmless, until a micro-batch holds one sample."""

    class Options(ObjectiveOptions):
        """Test."""

        sample: str = Field(description="Which sample.")
        deed: Literal["nan", "die", "leave", "raise", "statistics"] = Field(description="What to do.")

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        term = LossTerm(self.head(outputs.states()).square().sum())
        if any(image.record.sample_id == self.options.sample for image in outputs.images):
            match self.options.deed:
                case "nan":
                    return LossTerm(term.total * float("nan"))
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "leave":
                    os._exit(7)
                case "raise":
                    raise RuntimeError("the trap has sprung")
                case "statistics":
                    return LossTerm(term.total, statistics={"seen": torch.ones(1)})
        return term
