"""Says what pydantic found in a recipe's own words: what is wrong with a value, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

T = TypeVar("T")
SAID, ABSENT = "said", "absent"
"""Types of errors whose words are ours already: about a value that is there, and about a key that is not."""
_WANTED = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "path": "a path",
    "list": "a list", "tuple": "a list", "dict": "a mapping", "mapping": "a mapping", "model": "a mapping",
}  # fmt: skip


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is probably meant to be."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'ross'?`, or all known names where none is close."""
    names = sorted(known)
    meant = closest(name, names)
    return f"; did you mean '{meant}'?" if meant else f"; known: {', '.join(names) or 'none'}"


def said(message: str, absent: bool = False) -> PydanticCustomError:
    """An error to raise in a validator; `absent`: about a key that should be there, the last of the location."""
    return PydanticCustomError(ABSENT if absent else SAID, "{text}", {"text": message})


def said_at(message: str, key: str) -> ValidationError:
    """The same, about a key of the validated mapping."""
    return ValidationError.from_exception_data("value", [InitErrorDetails(type=said(message), loc=(key,), input=key)])


def explain(error: ValidationError, model: type[BaseModel], also: Iterable[str] = ()) -> ValidationError:
    """The same errors, at the same places, in plain words. `also`: keys that are valid beside the model's own."""
    known = {*(info.alias or name for name, info in model.model_fields.items()), *also}
    return ValidationError.from_exception_data(model.__name__, _lines(error, known))


def each(values: Mapping[str, Any], check: Callable[[str, Any], T]) -> dict[str, T]:
    """`check(key, value)` of every entry, and all their errors at once, each at its key."""
    checked: dict[str, T] = {}
    lines: list[InitErrorDetails] = []
    for key, value in values.items():
        try:
            checked[key] = check(key, value)
        except ValidationError as error:
            lines += _lines(error, set(), (key,))
        except PydanticCustomError as error:
            lines.append(InitErrorDetails(type=error, loc=(key,), input=value))
    if lines:
        raise ValidationError.from_exception_data("entries", lines)
    return checked


def _lines(error: ValidationError, known: set[str], outer: tuple[str, ...] = ()) -> list[InitErrorDetails]:
    return [
        InitErrorDetails(type=_worded(line, known), loc=(*outer, *line["loc"]), input=line["input"])
        for line in error.errors(include_url=False)
        if line["type"] != "default_factory_not_called"  # follows from an error that is in the list
    ]


def _worded(line: Any, known: set[str]) -> PydanticCustomError:
    kind, context = line["type"], line.get("ctx", {})
    wanted = _WANTED.get(kind.split("_")[0]) if kind.endswith(("_type", "_parsing", "_from_float")) else None
    if kind in (SAID, ABSENT):
        return said(line["msg"], kind == ABSENT)
    if kind == "missing":
        return said(f"the required key '{line['loc'][-1]}' is missing", absent=True)
    if kind == "extra_forbidden":
        key = str(line["loc"][-1])
        return said(f"unknown key '{key}'" + (did_you_mean(key, known) if len(line["loc"]) == 1 else ""))
    if kind in ("value_error", "assertion_error"):
        return said(" ".join(str(context["error"]).split()))  # other libraries' words may have several lines
    if kind == "literal_error":
        wanted = context["expected"]
    value = {"None": "empty", "True": "true", "False": "false"}.get(text := repr(line["input"]), text)
    quotes = " (put it in quotes)" if kind == "string_type" and isinstance(line["input"], bool | int | float) else ""
    start = f"must be {wanted}" if wanted else line["msg"].replace("Input should", "must", 1)
    return said(f"{start}, not {value if len(value) <= 60 else value[:57] + '…'}{quotes}")
