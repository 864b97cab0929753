"""What `foveate compare` trains: each recipe with each value of a key; all checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.data.dataset import SampleError
from foveate.errors import UserError
from foveate.metrics import Answer
from foveate.recipe_file import load_recipe
from foveate.yaml_tree import Place, parse_yaml
from foveate_lab.compare_results import FILES, Result
from foveate_lab.compare_words import Vary, folder_name

if TYPE_CHECKING:
    from foveate.recipe import Evaluate, Recipe

_OWN = {"name": None, "output": None}
"""Keys of a recipe that every variant has for itself."""
_TRIED = 8
"""Held-out samples that metrics are tried with."""


@dataclass(frozen=True)
class Variant:
    """A recipe, with one of the values where a key is varied. `name` is valid as a folder's."""

    name: str
    recipe: Path
    recipe_name: str
    changes: tuple[str, ...]
    """As `--set` takes them."""
    resolved: dict[str, Any]
    value: Any = None
    """As YAML reads it; None where no key is varied."""

    def facts(self, varied: bool) -> dict[str, Any]:
        """For the numbers' file: recipe, its name, and the value where a key is `varied`."""
        return {"recipe": str(self.recipe), "name": self.recipe_name, **({"value": self.value} if varied else {})}

    def __str__(self) -> str:
        return " with ".join((str(self.recipe), *self.changes[-1:]))


def read_variants(recipes: Sequence[Path], vary: Vary | None, overrides: Sequence[str]) -> list[Variant]:
    """All variants, in the order of recipes and values. Raises `UserError` for what cannot be compared."""
    variants: list[Variant] = []
    wish: Evaluate | None = None
    for path in recipes:
        for text in vary.values if vary else (None,):
            change = () if text is None or vary is None else (f"{vary.key}={text}",)
            where = " with ".join((str(path), *change))
            try:
                recipe = load_recipe(path, [*overrides, *change])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            if recipe.evaluate is None:
                raise UserError(f"{where} has no `evaluate`, so there would be nothing to compare.")
            wish = wish or recipe.evaluate
            name = _name(recipe, text, len(recipes) > 1)
            value = None if text is None else parse_yaml(text, Path.cwd(), lambda *at: Place("--vary")).root
            variant = Variant(name, path, recipe.name, (*overrides, *change), recipe.resolved(), value)
            _check(variant, variants)
            variants.append(variant)
    if wish is not None:
        _check_metrics(wish)
    return variants


def default_folder(variants: Sequence[Variant], vary: Vary | None) -> Path:
    """Where runs, table and plot go, for the names of the recipes and what is varied."""
    names = list(dict.fromkeys(variant.recipe_name for variant in variants))
    words = [names[0]] + ([f"and-{len(names) - 1}-more"] if len(names) > 1 else [])
    words += [folder_name(vary.key.rpartition(".")[2])] if vary else ["seeds"] if len(names) == 1 else []
    return Path("runs") / "-".join(words)


def differences(one: Any, other: Any, key: str = "") -> list[str]:
    """`KEY: ONE → OTHER` for each value of nested mappings and lists that differs."""
    pairs: Iterator[tuple[Any, Any, Any]]
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((name, one.get(name), other.get(name)) for name in {**one, **other})
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = ((number, *pair) for number, pair in enumerate(zip(one, other, strict=True)))
    else:
        return [] if one == other else [f"{key}: {one} → {other}"]
    return [text for name, old, new in pairs for text in differences(old, new, f"{key}.{name}".lstrip("."))]


def some(changed: Sequence[str]) -> str:
    """The first of them, for an error."""
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(text[:300] for text in changed[:3]) + more


def _name(recipe: Recipe, value: str | None, several: bool) -> str:
    """The recipe's name where there are several recipes, the value where a key is varied."""
    words = [recipe.name] if several or value is None else []
    return "-".join([*words, *([] if value is None else [folder_name(value)])])


def _check(variant: Variant, others: Sequence[Variant]) -> None:
    """Raises `UserError` where a variant cannot stand beside the others."""
    if variant.name in FILES:
        raise UserError(f"{variant}: '{variant.name}' is the name of a file beside the runs; give it another.")
    for other in others:
        if variant.name.casefold() == other.name.casefold():  # some file systems do not tell case apart
            raise UserError(
                f"two variants would have the folder '{variant.name}': {other}, and {variant}. Give the recipes other "
                "names (`name`), or leave one out."
            )
        if changed := differences(other.resolved["evaluate"], variant.resolved["evaluate"], "evaluate"):
            raise UserError(
                f"'{other.name}' and '{variant.name}' are not evaluated alike ({some(changed)}), so that their numbers "
                "would not compare. Give all the same `evaluate`."
            )
        if {**other.resolved, **_OWN} == {**variant.resolved, **_OWN}:
            raise UserError(f"'{other.name}' and '{variant.name}' are the same recipe. Leave one out.")


def _check_metrics(wish: Evaluate) -> None:
    """Tries the metrics with made-up answers to a few held-out samples. Raises `UserError` without accuracies."""
    chosen = wish.data[0].dataset
    data, answers = chosen.cls(chosen.options), list[Answer]()
    for index in range(min(len(data), _TRIED)):
        with suppress(SampleError):  # training tells
            answers.append(Answer(str(index), data[index].meta, index % 2 == 0, index % 3 == 0))
    told = []
    for component in wish.metrics:
        metric = component.cls(component.options)
        metric.update(answers)
        told.append(vars(metric.summary()))
    try:
        Result.read(told)
    except ValueError as error:
        names = ", ".join(component.type for component in wish.metrics)
        raise UserError(f"`evaluate` with the metrics {names}: {error}") from error
