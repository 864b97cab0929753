"""The words of `foveate compare`: read before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import UserError


@dataclass(frozen=True)
class Vary:
    """A key of the recipe, and its values as they were written."""

    key: str
    values: tuple[str, ...]


def read_vary(text: str) -> Vary:
    """`KEY=A,B,…`. Raises `UserError`."""
    key, equals, rest = (word.strip() for word in text.partition("="))
    values = tuple(word.strip() for word in rest.split(","))
    if not (key and equals and all(values)):
        raise UserError(f"--vary takes KEY=A,B,…, such as objectives.victor.pool_size=1,64,256; not '{text}'.")
    return Vary(key, values)


def read_seeds(text: str) -> list[int]:
    """Raises `UserError` for what is not a list of different seeds."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,10}", word, re.ASCII) and int(word) < 2**32 for word in words):
        raise UserError(f"--seeds takes whole numbers from 0 on, such as 0,1,2; not '{text}'.")
    seeds = [int(word) for word in words]
    if len({*seeds}) < len(seeds):
        raise UserError(f"--seeds {text}: one stands there twice, and would be the same run.")
    return seeds


def check_overrides(overrides: Sequence[str], vary: Vary | None) -> None:
    """Raises `UserError` for keys that the command itself sets, or that `vary` would replace."""
    keys = [text.partition("=")[0].strip() for text in overrides]
    instead = {"seed": "--seeds", "output": "--out"}
    for option, key in [*(("--set", key) for key in keys), *([("--vary", vary.key)] if vary else [])]:
        if key in instead:
            raise UserError(f"{option} {key}: give {instead[key]} instead.")
    if vary and (lost := [key for key in keys if f"{key}.".startswith(f"{vary.key}.")]):
        raise UserError(f"--set {lost[0]} would be lost: --vary {vary.key} replaces it.")


def folder_name(text: str) -> str:
    """A value as letters, digits and `_ . + -`, a letter or digit first. Raises `UserError` where none is left."""
    words = re.sub(r"^-(?=[\d.])", "minus-", text)
    words = re.sub(r"(^|-)\.(?=\d)", r"\g<1>0.", words)
    words = re.sub(r"[^\w.+-]+", "-", words).lstrip("-.+").rstrip("-.")
    if not words or len(words) > 100:
        raise UserError(f"--vary: '{text[:200]}' cannot name a folder; a value has 1 to 100 letters and digits.")
    return words
