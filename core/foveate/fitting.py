"""Fitting teachers, and starting heads, from the user's own pictures, once a run.

What was fitted is kept in the run folder, a head in the checkpoints.

`RUN/teachers/NAME/` holds `fit.json` (fingerprint, and what the fit told), the teacher's weights, and, where a later
stage trains the encoder whose states the teacher reads, the encoder's weights of the time of the fit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.assembly import Assembly
from foveate.checkpoint import read_tensors
from foveate.errors import DataError
from foveate.files import atomic_folder, check_seal, read_json, write_json
from foveate.forward_pass import teacher_inputs, visual_tokens
from foveate.model.build import load_strictly
from foveate.objective import EditInputs, Moment, Teacher, TeacherInputs, VisionObjective
from foveate.recipe import Recipe, Stage
from foveate.session import Session
from foveate.targets import called
from foveate.types import Batch

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
        first = _first_stage(recipe, name)
        wanted = options.fit_before or (first.name if first else None)
        if wanted is not None and names.index(wanted) <= names.index(stage.name):
            due.append(name)  # also those of stages that a resumed run has left behind
    return due


def stored_fit(run: Path, key: str) -> Path | None:
    """The folder of the fit of a teacher with this fingerprint, if the run has it. Raises `RunError` for damage."""
    folders = [path for path in sorted((run / TEACHERS).glob("*")) if path.is_dir() and not path.name.startswith(".")]
    for folder in folders:
        advice = f"Restore it from a copy; or delete {folder}, and --resume fits this teacher to its pictures again."
        check_seal(folder, advice)
    return next((folder for folder in folders if read_json(folder / FIT)["fingerprint"] == key), None)


def _load_or_fit(session: Session, name: str, teacher: nn.Module) -> dict[str, float] | None:
    """What the fit of a teacher told, the run's or a new one, which is kept; None where nothing had to be fitted."""
    teachers, folder = session.teachers, session.run.folder / TEACHERS / name
    stored = stored_fit(session.run.folder, teachers.keys[name])
    if stored is not None:
        load_strictly(teacher, read_tensors(stored / WEIGHTS), ("",), f"the teacher in {stored}")
        told: dict[str, float] = read_json(stored / FIT)["told"]
        return told
    if session.learner.rules[name].call("needs_fit"):
        session.display.say(f"fitting the teacher of {name} …")
    found = teachers.fit(name, lambda: pictures(session, name))
    if found is None:
        return None
    with atomic_folder(folder) as aside:
        save_file(_state(teacher.state_dict()), aside / WEIGHTS)
        if isinstance(teacher, Teacher):
            teacher.save(aside)
        if session.learner.rules[name].reads.teacher and any(map(_trains_encoder, session.recipe.stages)):
            encoder = session.lmm.encoder.state_dict(keep_vars=True)
            save_file(_state({key: session.frozen.value(value) for key, value in encoder.items()}), aside / ENCODER)
        write_json(aside / FIT, {"fingerprint": teachers.keys[name], "told": dict(found)})
    session.display.say(f"teacher of {name} fitted: {told_in_words(found)}")
    return dict(found)


def told_in_words(found: Mapping[str, float]) -> str:
    """What a fit told, on one line; numbers `NAME/1`, `NAME/2`, … stand behind one another under their name."""
    words: dict[str, list[str]] = {}
    for key, value in found.items():
        name, _, number = key.rpartition("/")
        words.setdefault(f"{name} by depth" if name and number.isdecimal() else key, []).append(f"{value:.4g}")
    return ", ".join(f"{key} {' '.join(values)}" for key, values in words.items())


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
        load_strictly(encoder, read_tensors(stored / ENCODER), ("",), f"the encoder in {stored}")
    _share(session, encoder)
    teachers.encoders[key] = encoder


def _share(session: Session, module: nn.Module) -> None:
    """Every process gets the main process's weights."""
    if session.accelerator.num_processes > 1:
        for tensor in module.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def start_heads(session: Session, stage: Stage) -> None:
    """Lets objectives whose first stage this is start their heads from its pictures; all get the main process's.

    To be called when the stage's parts have their dtypes. Nothing happens to heads that came with the model, nor where
    a run is resumed inside the stage.
    """
    found = session.checkpoint
    inside = found is not None and found.state["stage"] == stage.name
    for name in () if inside else session.recipe.active(stage):
        objective = session.objectives[name]
        starts = type(objective).start_head is not VisionObjective.start_head and name not in session.given
        if starts and _first_stage(session.recipe, name) is stage:
            if session.accelerator.is_main_process:
                start_head(objective, name, _tokens(session, name))
            _share(session, objective)


def start_head(objective: VisionObjective, name: str, batches: Iterable[EditInputs]) -> None:
    """Start the head of one objective; what it draws from torch's generator depends on the seed alone."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(Moment(objective.context.seed).seed_of("start", name))
        called(objective, name, "start_head", batches)


def _tokens(session: Session, name: str) -> Iterator[EditInputs]:
    moment = Moment(session.recipe.seed, "start")
    for batch in _batches(session, name):
        with session.accelerator.autocast():
            inputs = visual_tokens(session.lmm, batch, name, moment)
        yield inputs


def pictures(session: Session | Assembly, name: str) -> Iterator[TeacherInputs]:
    """The pictures of the first stage that an objective is active in, in seeded order, again and again."""
    rule = session.learner.rules[name]
    return (teacher_inputs(batch, rule, session.lmm.encoder) for batch in _batches(session, name))


def _first_stage(recipe: Recipe, name: str) -> Stage | None:
    return next((entry for entry in recipe.stages if name in recipe.active(entry)), None)


def _batches(session: Session | Assembly, name: str) -> Iterator[Batch]:
    stage, found = _first_stage(session.recipe, name), False
    device = next(session.lmm.parameters()).device
    assert stage is not None
    data = session.data.stage(stage, only=name)
    while True:
        for work in data.steps():
            for batch in (batch for batch in work.batches if name in batch.rows and not batch.rows[name].dummy):
                found = True
                yield batch.to(device)
        if not found:
            raise DataError(f"stage {stage.name} has no picture for objective '{name}', which is fitted to them")
