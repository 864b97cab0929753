"""The teachers of a run: built when first needed, frozen, shared by objectives that name the same one, fitted once.

They are neither modules of the learner nor of an objective, so no optimizer, wrapper or checkpoint ever sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError, PluginError
from foveate.objective import TeacherInputs, VisionObjective


class TeacherRoom:
    """Teachers by fingerprint, on `device` in `dtype`; targets come out in `full` precision."""

    def __init__(
        self,
        objectives: Mapping[str, VisionObjective],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        full: torch.dtype = torch.float32,
    ):
        self.objectives, self.device, self.dtype, self.full = dict(objectives), torch.device(device), dtype, full
        self.keys = {name: objective.teacher_fingerprint() for name, objective in objectives.items()}
        self._teachers: dict[str, nn.Module | None] = {}
        self.fitted: dict[str, Mapping[str, float] | None] = {}  # fingerprint → what the fit told, None: needs none
        self.encoders: dict[str, Any] = {}  # fingerprint → its own frozen copy of the model's encoder

    def of(self, name: str) -> nn.Module | None:
        """The teacher of an objective, built now if it is the first time. Raises `PluginError` where that fails."""
        key = self.keys[name]
        if key not in self._teachers:
            objective = self.objectives[name]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(objective.context.seed)
                teacher = called(objective, name, "build_teacher")
            if teacher is not None:
                teacher.eval().requires_grad_(False).to(device=self.device, dtype=self.dtype)
                own = {id(tensor) for tensor in (*objective.parameters(), *objective.buffers())}
                if any(id(tensor) in own for tensor in (*teacher.parameters(), *teacher.buffers())):
                    raise PluginError(
                        f"objective '{name}' keeps its teacher as a sub-module: it would be trained, saved and "
                        "sharded. Return it from build_teacher and do not assign it to self."
                    )
            self._teachers[key] = teacher
        return self._teachers[key]

    def has_teacher(self, name: str) -> bool:
        """Whether an objective has one."""
        return self.of(name) is not None

    @torch.no_grad()
    def encode(self, name: str, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        """One record an image, on the device, in full precision where floating. Raises `PluginError`."""
        objective, teacher = self.objectives[name], self.of(name)
        inputs = self._cast(inputs, self.dtype)
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, dtype=self.dtype if half else torch.bfloat16, enabled=half):
            records = called(objective, name, "encode_target", teacher, inputs)
        if len(records) != len(inputs.records):
            raise PluginError(f"objective '{name}': {len(records)} target records for {len(inputs.records)} images")
        return [{key: self._full(value) for key, value in record.items()} for record in records]

    @staticmethod
    def _cast(inputs: TeacherInputs, dtype: torch.dtype) -> TeacherInputs:
        def own(value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() else value

        return inputs.with_prepared([{key: own(value) for key, value in views.items()} for views in inputs.prepared])

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.full) if tensor.is_floating_point() else tensor

    def fit(self, name: str, batches: Callable[[], Iterable[TeacherInputs]]) -> Mapping[str, float] | None:
        """Let an objective fit its teacher; None where that needs no fit."""
        teacher, objective = self.of(name), self.objectives[name]
        if teacher is None or not objective.needs_fit(objective.options):
            return None
        teacher.to(self.full).requires_grad_(True)  # statistics and gradients in full precision
        inputs = (self._cast(batch, self.full) for batch in batches())
        with torch.random.fork_rng():  # a resumed run, which does not fit again, draws what this one draws
            torch.manual_seed(objective.context.seed)
            told: Mapping[str, float] = called(objective, name, "fit_teacher", teacher, inputs)
        teacher.eval().requires_grad_(False).to(self.dtype)
        return told


def called(objective: VisionObjective, name: str, method: str, *arguments: Any) -> Any:
    """A method of an objective; what it raises becomes a `PluginError` that names objective and method."""
    try:
        return getattr(objective, method)(*arguments)
    except (FoveateError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = f"{type(objective).__module__}.{type(objective).__qualname__}.{method}"
        raise PluginError(f"objective '{name}' failed in {where}: {type(error).__name__}: {error}") from error
