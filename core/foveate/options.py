"""The base of everything that a recipe configures: pydantic options, strict about keys, and paths of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Options(BaseModel):
    """Base of all options: unknown keys are errors, numbers finite, values immutable; every field has a description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False
    )


def recipe_folder(info: ValidationInfo) -> Path:
    """The folder against which a relative path in the field under validation is read: that of the file it stands in."""
    context: dict[str, Any] = info.context or {}
    return Path((context.get("folders") or {}).get(info.field_name) or context.get("folder", "."))


def absolute(path: str | Path, folder: Path) -> Path:
    """A path of a recipe, `~` expanded, relative to `folder`. Raises `ValueError` for what can be no path."""
    try:
        found = folder / Path(path).expanduser()
        found.resolve().exists()
        return found
    except (OSError, RuntimeError, ValueError) as error:  # unknown users, loops of links, NUL, names too long
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:200]!r} cannot be a path: {reason}") from None


def _resolve(path: Path, info: ValidationInfo) -> Path:
    return absolute(path, recipe_folder(info)).resolve()


def _existing(path: Path, info: ValidationInfo) -> Path:
    resolved = _resolve(path, info)
    if not resolved.exists():
        raise ValueError(f"no such file or folder: {resolved}")
    return resolved


def _folder_or_id(value: str, info: ValidationInfo) -> str:
    folder = _resolve(Path(value), info)
    if not folder.is_dir() and (value.startswith((".", "/", "~")) or value.count("/") > 1):
        raise ValueError(f"no such folder: {folder}")
    return str(folder) if folder.is_dir() else value


RecipePath = Annotated[Path, AfterValidator(_resolve)]
"""A path, relative to the recipe's folder; it need not exist."""

ExistingPath = Annotated[Path, AfterValidator(_existing)]
"""A path, relative to the recipe's folder, that must exist when the recipe is read."""

FolderOrId = Annotated[str, AfterValidator(_folder_or_id)]
"""A folder, relative to the recipe's, or else an id of the hub."""
