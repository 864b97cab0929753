"""Checks of what an objective is: its options, its registration, how it is built, what its class methods make."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from foveate.data.images import aligned, open_image
from foveate.data.views import ObjectiveRule
from foveate.errors import FoveateError
from foveate.model.build import load_strictly
from foveate.objective import ObjectiveOptions, VisionObjective
from foveate.plugins import installed_plugins
from foveate.testing.kit import Kit, apart, fail_unless_close
from foveate.testing.models import build_objective
from foveate.testing.report import Failed, Skipped


def options(kit: Kit) -> str:
    """Unknown keys are refused, every field is described, and resolved options give the same options again."""
    cls, given, context = kit.chosen.cls.Options, kit.chosen.options, {"plugins": kit.plugins or installed_plugins()}
    problems = []
    if not issubclass(cls, ObjectiveOptions):
        problems.append(f"{cls.__qualname__} is no subclass of ObjectiveOptions")
    resolved = given.model_dump(mode="json", by_alias=True)
    try:
        cls.model_validate({**resolved, "no_such_option": 1}, context=context)
        problems.append("the unknown key 'no_such_option' is accepted")
    except ValidationError as error:
        if not any(line["loc"] == ("no_such_option",) for line in error.errors()):
            problems.append(f"its own resolved values are refused: {error.errors()[0]['msg']}")
    bare = [name for name, entry in cls.model_fields.items() if not entry.description]
    problems += [f"no description: {', '.join(bare)}"] if bare else []
    if not problems:
        again = cls.model_validate(json.loads(json.dumps(resolved)), context=context)
        other = again.model_dump(mode="json", by_alias=True)
        different = [key for key in resolved if other.get(key) != resolved[key]]
        problems += [f"written to JSON and read again, other values: {', '.join(different)}"] if different else []
    if problems:
        raise Failed(
            "; ".join(problems),
            "A run writes its resolved recipe and is resumed from it; a misspelt key must be an error, and the "
            "descriptions are all that a user sees of an option.",
            "Derive Options from ObjectiveOptions, give every field a description=, keep extra='forbid', and use "
            "field types that pydantic can write as JSON.",
        )
    return f"{len(cls.model_fields)} fields, all described; unknown keys refused; the same after JSON"


def registration(kit: Kit) -> str:
    """The name is registered, by a plugin that is not broken."""
    entry = kit.chosen.registration
    if entry is None:
        raise Skipped("checked for a registered name; this is a class")
    broken = (kit.plugins or installed_plugins()).broken
    if entry.owner in broken:
        raise Failed(
            f"'{entry.name}' of {entry.owner}, which is broken: {broken[entry.owner].strip().splitlines()[-1]}",
            "A recipe that names the objective stops with this error.",
            "Mend the plugin; `foveate plugins` shows its traceback.",
        )
    if not (isinstance(kit.chosen.cls, type) and issubclass(kit.chosen.cls, VisionObjective)):
        raise Failed(
            f"'{entry.name}' of {entry.owner} is {kit.chosen.cls!r}",
            "Core calls the methods of foveate.VisionObjective.",
            "Register a subclass of foveate.VisionObjective.",
        )
    return f"'{entry.name}', by {entry.owner}"


def construction(kit: Kit) -> str:
    """Built twice with one seed it is the same, also without memory; all it holds is registered and trainable."""
    lmm, why = kit.lmm, "`foveate plan` builds every objective without memory, and a run builds it by its seed."
    try:
        with torch.device("meta"):
            build_objective(kit.chosen, lmm, kit.name)
    except Exception as error:
        do = "Do in __init__ nothing but make modules, parameters and buffers; look at no value of a tensor."
        raise Failed(f"__init__ fails on the meta device: {type(error).__name__}: {error}", why, do) from error
    first, second = (build_objective(kit.chosen, lmm, kit.name, kit.seed) for _ in range(2))
    state = second.state_dict()
    changed = [key for key, value in first.state_dict().items() if not torch.equal(value, state[key])]
    if changed:
        do = "Draw initial weights with torch's functions; core seeds them before __init__."
        raise Failed(f"built twice with one seed, other values: {', '.join(changed)}", why, do)
    if hidden := sorted(_unregistered(first)):
        raise Failed(
            f"modules or parameters in plain containers: {', '.join(hidden)}",
            "What is not registered is neither trained, nor saved, nor moved to the device; a teacher hidden there "
            "would be built in every process and twice.",
            "Use nn.ModuleList, nn.ModuleDict or nn.ParameterList for heads; return a teacher from build_teacher.",
        )
    frozen = [name for name, parameter in first.named_parameters() if not parameter.requires_grad]
    averaged = type(first).after_step is not VisionObjective.after_step  # a copy that is moved after steps
    if frozen and not averaged:
        raise Failed(
            f"{len(frozen)} parameters with requires_grad=False: {', '.join(frozen[:4])}",
            "Nothing ever changes them: core leaves what __init__ froze frozen, and saves it as part of the head.",
            "Make a fixed table a buffer (register_buffer); return a frozen model from build_teacher.",
        )
    count = sum(parameter.numel() for parameter in first.parameters())
    told = f"{count:,} parameters, {sum(1 for _ in first.buffers())} buffers; built on meta; the same for the same seed"
    note = f"; {len(frozen)} frozen ones, moved after steps"
    return told + (note if frozen else "")


def _unregistered(objective: nn.Module) -> Iterator[str]:
    """Attributes that hold modules or parameters in a list, tuple, set or dict of Python."""
    for name, module in objective.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_modules", "_buffers") or not isinstance(value, list | tuple | set | dict):
                continue
            entries = value.values() if isinstance(value, dict) else value
            if any(isinstance(entry, nn.Module | nn.Parameter) for entry in entries):
                yield f"{name}.{key}".strip(".")


def pickles(kit: Kit) -> str:
    """Loader processes get the class and its options."""
    cls = kit.chosen.cls
    if "<locals>" in cls.__qualname__:
        raise Skipped(f"{cls.__qualname__} is defined in a function; a class of a module can be checked")
    rule = ObjectiveRule(kit.name, cls, kit.chosen.options)
    try:
        data = pickle.dumps(rule)
        again: ObjectiveRule = pickle.loads(data)
    except Exception as error:
        raise Failed(
            f"{type(error).__name__}: {error}",
            "Loader processes that are spawned get the objective's class and options as a pickle.",
            "Keep the class at the top of an importable module, and only plain values in its options.",
        ) from error
    if again.cls is not cls or again.options != kit.chosen.options:
        raise Failed(
            "the class or the options are others after pickling",
            "Loader processes would prepare other pictures than the training process expects.",
            "Keep only values in the options that compare equal after pickling.",
        )
    return f"class and options, {len(data):,} bytes"


def class_methods(kit: Kit) -> str:
    """reads, attention, extra_tokens and prepare_image give the same for the same, and leave the picture alone."""
    rule, rules, made = kit.start.rule, kit.start.rules, 0
    why = "Loader processes call class methods on their own, and one picture goes to all objectives."
    for method in ("reads", "attention"):
        if (first := rule.call(method)) != (second := rule.call(method)):
            do = f"Let {method} depend on its arguments alone."
            raise Failed(f"{method}(options) gives {first} and then {second}", why, do)
    for sample in kit.start.samples.values():
        for record, ref in zip(sample.images, sample.refs, strict=True):
            if kit.name not in record.objectives:
                continue
            if (tokens := rule.extra(record)) != rule.extra(record) or tokens < 0:
                raise Failed(f"extra_tokens gives {tokens}", why, "Return the same number from 0 on for a record.")
            picture = aligned(open_image(ref, sample.id), rules.encoder, rules.geometry)
            before = picture.tobytes()
            views, again = rule.prepare(picture, record), rule.prepare(picture, record)
            if picture.tobytes() != before:
                raise Failed("prepare_image changes the picture in place", why, "Work on image.copy().")
            _check_views(views, again, why)
            made += bool(views)
    return f"the same twice; prepare_image made views of {made} pictures"


def _check_views(views: Any, again: Any, why: str) -> None:
    """Raises `Failed` for views that are no CPU tensors by name, and for those that differ."""
    tensors = views.values() if isinstance(views, dict) else [None]
    if not all(isinstance(view, Tensor) and view.device.type == "cpu" for view in tensors):
        raise Failed(f"prepare_image returns {views!r:.100}", why, "Return a dict of names and CPU tensors.")
    if views.keys() != again.keys() or not all(torch.equal(views[name], again[name]) for name in views):
        do = "Let prepare_image depend on its arguments alone; what is random belongs in loss, by outputs.generator."
        raise Failed("prepare_image makes two different views of one picture", why, do)


def round_trip(kit: Kit) -> str:
    """Its state goes through safetensors into a fresh objective, strictly, and gives the same loss."""
    trained, why = kit.trained, "A resumed run and `model.from` start from the state that was saved."
    state = {key: value.detach().contiguous().clone() for key, value in trained.objective.state_dict().items()}
    fresh = build_objective(kit.chosen, trained.lmm, kit.name, kit.seed + 1).double()
    try:
        data = save_tensors(state)
        if state or list(fresh.parameters()):
            load_strictly(fresh, load_tensors(data), ("",), "the saved head")
    except (FoveateError, AttributeError, TypeError, ValueError) as error:
        do = "Keep tensors only in the state, under the same names in every objective with the same options."
        raise Failed(f"{type(error).__name__}: {error}", why, do) from error
    learner = type(trained.learner)(trained.lmm, {kit.name: fresh}, trained.teachers)
    first, second = kit.total(trained.mixed), kit.total(trained.mixed, learner)
    fail_unless_close(
        apart(first, second),
        f"the loss is {first:.10g} before saving and {second:.10g} after loading",
        why,
        "Whatever training changes must be a parameter or a persistent buffer.",
    )
    return f"{len(state)} tensors, {len(data):,} bytes; the same loss"
