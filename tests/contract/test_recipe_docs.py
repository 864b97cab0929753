"""The recipe's reference: `docs/recipe.md` is what the schema says, and the schema says something of every key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from foveate import builtin
from foveate.plugins import load_plugins
from foveate.recipe import DATASET, Recipe
from foveate.recipe_docs import _model_in, render

ROOT = Path(__file__).parents[2]


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        inner, _ = _model_in(field.annotation)
        if inner is not None:
            yield from models(inner)


def options() -> list[type[BaseModel]]:
    plugins = load_plugins([])
    plugins.add(builtin, "foveate")
    parts = [
        part.load().Options for kind, names in plugins.names.items() if kind != "commands" for part in names.values()
    ]
    return list(dict.fromkeys(inner for model in (Recipe, *parts) for inner in models(model)))


def test_the_page_is_what_the_schema_says() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == render(), "write it anew: python -m foveate.recipe_docs docs/recipe.md"


@pytest.mark.parametrize("model", options(), ids=lambda model: model.__qualname__)
def test_every_key_is_described(model: type[BaseModel]) -> None:
    silent = [name for name, field in model.model_fields.items() if not field.description and field.alias != DATASET]
    assert not silent, f"{model.__qualname__}: {', '.join(silent)} without a description"
