"""What the recipe's fields are made of: the base of its sections, components, and checks of single values.

Checks sit on fields, never on whole sections, so that one defect hides no other. What a check needs to know of the
rest comes as pydantic's context: `folder`, `plugins`, `registry`, `objectives` and `templates` (their names).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
)

from foveate.explain import did_you_mean, each, explain, said
from foveate.options import Options, absolute, recipe_folder
from foveate.registry import Component, resolve

PARTS = ("encoder", "projector", "llm")
RESERVED = (*PARTS, "text")


def context_of(info: ValidationInfo) -> dict[str, Any]:
    """What `load_recipe` tells the checks; empty for sections made in Python."""
    return info.context if info.context is not None else {}


class Section(Options):
    """Base of the recipe's sections: errors in plain words, paths relative to the file that they were written in."""

    model_config = pydantic.ConfigDict(populate_by_name=True, validate_default=True)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _explained(cls, value: Any, handler: Any, info: ValidationInfo) -> Any:
        context = context_of(info)
        outer, context["folders"] = context.get("folders"), getattr(value, "folders", {})
        try:
            return handler(value)
        except ValidationError as error:
            raise explain(error, cls) from None
        finally:
            context["folders"] = outer


def component(kind: str, default: str | None = None, also: tuple[str, ...] = (), optional: bool = False) -> Any:
    """Makes a field a component of `kind`."""

    def check(value: Any, info: ValidationInfo) -> Component | None:
        return None if optional and value is None else resolve(kind, value, info.context, default, also)

    return PlainValidator(check)


def _objectives(value: Any, info: ValidationInfo) -> dict[str, Component]:
    if not isinstance(value, dict):
        raise said("must be a mapping: the objective's name, and its options")

    def check(name: str, options: Any) -> Component:
        if name in RESERVED or not re.fullmatch(r"[\w-]+", name):
            raise said(f"{name!r} cannot name an objective: letters, digits, _ and -, and not {', '.join(RESERVED)}")
        return resolve("objectives", {} if options is None else options, info.context, default=name)

    return each(value, check)


def _known(names: str, complaint: str) -> AfterValidator:
    """Refuses what is not among the context's `names`."""

    def check(name: str, info: ValidationInfo) -> str:
        known = context_of(info).get(names)
        if known is not None and name not in known:
            raise said(f"{complaint} {name!r}{did_you_mean(name, known)}")
        return name

    return AfterValidator(check)


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w .+-]{,199}", name) or name in ("model", "teachers"):
        raise said(f"{name!r} cannot name a folder of the run: letters, digits, space and _ . + -; not model, teachers")
    return name


def _block_slice(text: str) -> str:
    if not re.fullmatch(r"-?\d+:(-?\d+)?|:-?\d+", text):
        raise said(f"must be a slice of the blocks, such as '-4:' (the last four) or '0:12', not {text!r}")
    return text


def _not_empty(value: Any) -> Any:
    if value == []:
        raise said("must have at least one entry")
    return value


def _model_source(name: str | None, info: ValidationInfo) -> str | None:
    """A folder, relative to the recipe or (as `output` is) to the current folder, becomes absolute; else a hub id."""
    if name is None:
        return None
    folders = [absolute(name, base).resolve() for base in (recipe_folder(info), Path.cwd())]
    if found := [folder for folder in folders if folder.is_dir()]:
        return str(found[0])
    if any(folder.parent.is_dir() for folder in folders) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise said(f"no such folder: {folders[0]}")
    return name


TeacherChoice = Annotated[
    Component, component("teachers"), PlainSerializer(lambda chosen: chosen.resolved() if chosen else None)
]
"""An option of an objective: a teacher's name (a preset or a type), or `type` and its options."""

EncoderChoice = Annotated[
    Component, component("encoders", "hf"), PlainSerializer(lambda chosen: chosen.resolved() if chosen else None)
]
"""An option of a teacher: an encoder's preset, or `type` (default `hf`) and its options."""

Dtype = Literal["fp32", "bf16", "fp64"]
Count = Annotated[int, Field(gt=0, le=10**12)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
TemplateName = Annotated[str, _known("templates", "unknown template")]
ObjectiveNames = tuple[Annotated[str, _known("objectives", "the recipe has no objective")], ...]
Objectives = Annotated[dict[str, Component], PlainValidator(_objectives)]
ModelSource = Annotated[str | None, AfterValidator(_model_source)]
BlockSlice = Annotated[str, AfterValidator(_block_slice)]
NOT_EMPTY = BeforeValidator(_not_empty)
