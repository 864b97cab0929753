"""Fitting teachers to the user's own pictures, once a run; what was fitted is kept in the run folder.

`RUN/teachers/NAME/` holds `fit.json` (fingerprint, and what the fit told), the teacher's weights, and, where a later
stage trains the encoder whose states the teacher reads, the encoder's weights of the time of the fit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.errors import DataError
from foveate.files import atomic_folder, read_json, write_json
from foveate.forward_pass import teacher_inputs
from foveate.model.build import load_strictly
from foveate.objective import TeacherInputs
from foveate.recipe import Recipe, Stage
from foveate.session import Session

TEACHERS, FIT, WEIGHTS, ENCODER = "teachers", "fit.json", "weights.safetensors", "encoder.safetensors"


def fit_teachers(session: Session, stage: Stage) -> None:
    """Fits, or loads, the teachers that are due before `stage`; says what the fits told.

    The main process fits, and all others get its weights. Raises `DataError` where there is no picture to fit to.
    """
    main, teachers = session.accelerator.is_main_process, session.teachers
    for name in fitted_before(session.recipe, stage):
        key = teachers.keys[name]
        teacher = teachers.of(name)
        if key in teachers.fitted or teacher is None:
            continue
        told = _load_or_fit(session, name, teacher) if main else None
        [told] = broadcast_object_list([told])
        if told is not None:
            _share(session, teacher)
        teachers.fitted[key] = told
    stages = session.recipe.stages
    moved = any(_trains_encoder(entry) for entry in stages[: stages.index(stage) + 1])
    for name in session.recipe.active(stage) if moved else ():
        _give_encoder(session, name)


def fitted_before(recipe: Recipe, stage: Stage) -> list[str]:
    """Objectives whose teacher is due before a stage: it is their first, or their option `fit_before` names it."""
    names = [entry.name for entry in recipe.stages]
    due: list[str] = []
    for name, component in recipe.objectives.items():
        options: Any = component.options
        first = next((entry.name for entry in recipe.stages if name in recipe.active(entry)), None)
        wanted = options.fit_before or first
        if wanted is not None and names.index(wanted) <= names.index(stage.name):
            due.append(name)  # also those of stages that a resumed run has left behind
    return due


def stored_fit(run: Path, key: str) -> Path | None:
    """The folder of the fit of a teacher with this fingerprint, if the run has it."""
    folders = sorted((run / TEACHERS).glob(f"*/{FIT}"))
    return next((path.parent for path in folders if read_json(path)["fingerprint"] == key), None)


def _load_or_fit(session: Session, name: str, teacher: nn.Module) -> dict[str, float] | None:
    """What the fit of a teacher told, the run's or a new one, which is kept; None where nothing had to be fitted."""
    teachers, folder = session.teachers, session.run.folder / TEACHERS / name
    stored = stored_fit(session.run.folder, teachers.keys[name])
    if stored is not None:
        load_strictly(teacher, load_file(stored / WEIGHTS), ("",), f"the teacher in {stored}")
        told: dict[str, float] = read_json(stored / FIT)["told"]
        return told
    found = teachers.fit(name, lambda: pictures(session, name))
    if found is None:
        return None
    with atomic_folder(folder) as aside:
        save_file(_state(teacher.state_dict()), aside / WEIGHTS)
        if session.learner.rules[name].reads.teacher and any(map(_trains_encoder, session.recipe.stages)):
            encoder = session.lmm.encoder.state_dict(keep_vars=True)
            save_file(_state({key: session.frozen.value(value) for key, value in encoder.items()}), aside / ENCODER)
        write_json(aside / FIT, {"fingerprint": teachers.keys[name], "told": dict(found)})
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
    session.display.say(f"teacher of {name} fitted: {numbers}")
    return dict(found)


def _trains_encoder(stage: Stage) -> bool:
    return any(part.partition(".")[0] == "encoder" for part in stage.train)


def _give_encoder(session: Session, name: str) -> None:
    """A fitted teacher that reads the model's encoder gets a frozen copy of what it was fitted with."""
    teachers = session.teachers
    key = teachers.keys[name]
    if not session.learner.rules[name].reads.teacher or teachers.fitted.get(key) is None or key in teachers.encoders:
        return
    encoder = copy.deepcopy(session.lmm.encoder).to(teachers.full).eval().requires_grad_(False)
    stored = stored_fit(session.run.folder, key) if session.accelerator.is_main_process else None
    if stored is not None:
        load_strictly(encoder, load_file(stored / ENCODER), ("",), f"the encoder in {stored}")
    _share(session, encoder)
    teachers.encoders[key] = encoder


def _share(session: Session, module: nn.Module) -> None:
    """Every process gets the main process's weights."""
    if session.accelerator.num_processes > 1:
        for tensor in module.state_dict().values():
            broadcast(tensor)


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def pictures(session: Session, name: str) -> Iterator[TeacherInputs]:
    """The pictures of the first stage that an objective is active in, in seeded order, again and again."""
    recipe, device = session.recipe, session.device
    stage = next(entry for entry in recipe.stages if name in recipe.active(entry))
    rule, found = session.learner.rules[name], False
    data = session.data.stage(stage, only=name)
    while True:
        for work in data.steps():
            for batch in (batch for batch in work.batches if name in batch.rows and not batch.rows[name].dummy):
                found = True
                yield teacher_inputs(batch.to(device), rule, session.lmm.encoder)
        if not found:
            raise DataError(f"stage {stage.name} has no picture for objective '{name}', whose teacher is to be fitted")
