"""`docs/recipe.md` from the schema; ``python -m foveate.recipe_docs docs/recipe.md`` writes it anew."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from foveate import builtin
from foveate.objective import ObjectiveOptions
from foveate.plugins import load_plugins
from foveate.recipe import DATASET, Recipe
from foveate.registry import Component, load_registry

_INTRO = """# The recipe

Written by `python -m foveate.recipe_docs docs/recipe.md` from the schema; a test holds it to the code.

- **A part** (encoder, projector, LLM, objective, teacher, data set, metric) is a name or a mapping. A name is a preset
  of `registry.yaml` or a registered type; a mapping has `type` and options, or `preset` and the options to override. A
  `registry.yaml` beside the recipe adds presets.
- **Paths** are relative to the file they are written in; `output`, and paths in `--set`, to the current folder.
- **`extends: other.yaml`** changes another recipe: mappings are merged, lists and single values replaced. `name` and
  `output` are not inherited: each recipe has a run of its own. `stages` may be a mapping from the names of inherited
  stages to what changes in them.
- **`false`** takes out a stage (`stages: {align: false}`), a trained part (`train: {encoder: false}`), or an objective
  (`objectives: {ross: false}`), wherever stages and data name it. So a twin without an objective is two lines.
- **`--set stages.align.batch_size=8`** overrides one value, read as YAML; stages go by name or number.
- `1e-4` is a number, `4:12` and `no` are text (YAML 1.2). All errors are shown at once, with line and column.
"""
_NAMES: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true/false", Path: "path"}
_NAMES |= {type(None): "null", Component: "name | mapping", Any: "any"}
_ENTRIES: dict[Any, str] = {tuple: "[]", list: "[]", dict: ".PART"}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def render() -> str:
    """The page: the recipe's sections from the top down, then the options of the parts that core brings."""
    pages = [_INTRO, *(_section(model, f"`{path}`" if path else "Top level") for path, model in _sections(Recipe, ""))]
    plugins, registry = load_plugins([]), load_registry()[0]
    plugins.add(builtin, "foveate")
    pages.append("# Objectives\n\n`foveate plugins show NAME` tells the options of one; these every objective has.\n")
    pages.append(_section(ObjectiveOptions, "`objectives.NAME`"))
    for kind in ("encoders", "projectors", "llms", "teachers", "datasets"):
        presets = ", ".join(f"`{name}`" for name in registry.presets[kind])
        pages.append(f"# Types of {kind}\n" + (f"\nPresets: {presets}.\n" if presets else ""))
        for name, registration in plugins.names[kind].items():
            for path, model in _sections(registration.load().Options, ""):
                pages.append(_section(model, f"`type: {name}`" + (f", `{path}`" if path else "")))
    return "\n".join(pages)


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those inside of its fields, with their paths in the YAML; the keys of data sources once."""
    yield path, model
    for name, field in model.model_fields.items():
        inner, entry = _model_in(field.annotation)
        if inner is not None and (name != "data" or path == "stages[]"):
            yield from _sections(inner, f"{path}.{field.alias or name}{entry}".lstrip("."))


def _model_in(annotation: Any, entry: str = "") -> tuple[type[BaseModel] | None, str]:
    """The options inside an annotation, and how an entry is written if it is a list or a mapping of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, entry
    entry = _ENTRIES.get(get_origin(annotation), entry)
    return next((found for part in get_args(annotation) if (found := _model_in(part, entry))[0]), (None, ""))


def _section(model: type[BaseModel], title: str) -> str:
    rows = [_row(field.alias or name, field) for name, field in model.model_fields.items() if field.alias != DATASET]
    said = [" ".join(model.__doc__.split()), ""] if model.__doc__ else []
    return "\n".join([f"## {title}", "", *said, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    if _model_in(field.annotation)[0] and not field.is_required() and field.default is not None:
        default = "below"
    elif field.default_factory is not None or (field.is_required() and "Default:" in meaning):
        default = "computed"
    else:
        default = "**required**" if field.is_required() else f"`{json.dumps(field.default)}`"
    cells = (f"`{name}`", _type(field.annotation, field.metadata), default, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """An annotation in the page's words, with its limits."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], [one for meta in inner[1:] for one in getattr(meta, "metadata", [meta])])
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part, limits if part in (int, float) else ()) for part in inner)
    if origin in (tuple, list):
        return f"list of {_type(inner[0])}"
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in inner)
    bounds = [f"{sign} {getattr(one, key)}" for one in limits for key, sign in _SIGNS.items() if hasattr(one, key)]
    return " ".join([_NAMES.get(annotation, "mapping"), ", ".join(bounds)]).strip()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
