"""LLaVA conversation files: one JSON array, or one JSON object a line. Rows are parsed when they are asked for."""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from foveate.data.dataset import ConversationDataset, SampleError
from foveate.errors import DataError
from foveate.options import ExistingPath
from foveate.types import Conversation, ImageRef, Turn

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_short = reprlib.Repr()  # a message is no place for a row of megabytes
_short.maxstring = _short.maxother = 200
_brief = _short.repr
_GAP = re.compile(r"[\ufeff \t\r\n,]*")


class LlavaDataset(ConversationDataset):
    """A LLaVA-format JSON or JSONL file and the folder of its pictures."""

    class Options(ConversationDataset.Options):
        path: ExistingPath = Field(description="The JSON or JSONL file.")
        images: ExistingPath | None = Field(None, description="Folder of the pictures; default: the file's own.")

    options: Options

    def __init__(self, options: Options):
        super().__init__(options)
        self._spans = row_spans(options.path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Conversation:
        path, (start, stop) = self.options.path, self._spans[index]
        with open(path, "rb") as file:
            file.seek(start)
            row = json.loads(file.read(stop - start))
        picture = partial(picture_inside, self.options.images or path.parent)
        return conversation(row, f"{path.name} row {index}", f"{path.stem}-{index}", picture)

    def fingerprint(self) -> str:
        with open(self.options.path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def picture_inside(folder: Path | None, name: Any) -> Path:
    """The picture `name` of `folder`. Raises ValueError when it leads out of it, symbolic links followed."""
    if not isinstance(name, str) or not name or folder is None:
        raise ValueError(f"expected a picture's path, relative to the folder `images`, got {_brief(name)} and {folder}")
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not path.startswith(os.path.join(root, "")):
        raise ValueError(f"picture {_brief(name)} leads out of {root}: give paths that stay inside the folder")
    return Path(path)


def conversation(row: Any, where: str, default_id: str, picture: Callable[[Any], Any]) -> Conversation:
    """A row's `Conversation`; `picture` turns an entry of its image list into an `ImageRef`'s source.

    Keys: `id`, `image` or `images`, `roles` (parallel to it), `target_images`, `conversations` or `messages`, `meta`,
    `type` (it goes into `meta`); others are ignored. Raises `SampleError` of kind "row".
    """
    try:
        if not isinstance(row, Mapping):
            raise ValueError(f"expected an object, got {type(row).__name__}")
        if not isinstance(row.get("id"), str | int | float | None):
            raise ValueError(f"'id' must be text or a number, got {_brief(row['id'])}")
        where = f"{where} (id {_brief(row['id'])})" if row.get("id") is not None else where
        names = _listed(_one(row, "image", "images"))
        roles = _listed(row.get("roles")) or ["input"] * len(names)
        if len(roles) != len(names) or not set(roles) <= {"input", "target"}:
            told = f"'roles' must say 'input' or 'target' for each of {len(names)} images"
            raise ValueError(f"{told}, got {_brief(roles)}")
        pairs = [*zip(names, roles, strict=True), *((name, "target") for name in _listed(row.get("target_images")))]
        pairs.sort(key=lambda pair: pair[1] != "input")
        refs = tuple(ImageRef(picture(name), role) for name, role in pairs)
        turns = tuple(_turn(turn) for turn in _listed(_one(row, "conversations", "messages")))
        meta = row.get("meta") or {}
        if not isinstance(meta, Mapping):
            raise ValueError(f"'meta' must be an object, got {_brief(meta)}")
        meta = meta if row.get("type") is None else {"type": row["type"], **meta}
    except (ValueError, TypeError) as error:
        raise SampleError("row", where, str(error)) from None
    return Conversation(str(default_id if row.get("id") is None else row["id"]), turns, refs, meta)


def _turn(turn: Any) -> Turn:
    role, text = (_one(turn, "from", "role"), _one(turn, "value", "content")) if isinstance(turn, Mapping) else ("", "")
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"a turn needs 'from' (one of {', '.join(_ROLES)}) and 'value' (its text), got {_brief(turn)}")
    text.encode()  # half of a surrogate pair is no text
    return Turn(_ROLES[role], text)  # type: ignore[arg-type]


def _one(row: Mapping[str, Any], *keys: str) -> Any:
    given = {key: row[key] for key in keys if row.get(key) is not None}
    if len(given) > 1:
        raise ValueError(f"has both {' and '.join(map(repr, given))}: keep one")
    return next(iter(given.values()), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def row_spans(path: Path) -> np.ndarray:
    """Byte ranges `[rows, 2]` of an array's rows, or of lines. Raises `DataError` with the place that is not JSON."""
    spans, decode = list[tuple[int, int]](), json.JSONDecoder().raw_decode
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        text = path.read_bytes().decode()
        at = text.find("[") + 1
        is_array = at > 0 and not text[: at - 1].strip("\ufeff \t\r\n")
        at = at if is_array else 0
        byte = len(text[:at].encode())
        while (start := _GAP.match(text, at).end()) < len(text) and text[start] != "]":  # type: ignore[union-attr]
            stop = decode(text, start)[1]
            first = byte + len(text[at:start].encode())
            at, byte = stop, first + len(text[start:stop].encode())
            spans.append((first, byte))
        if text[start:].strip() != "]" * is_array:
            raise ValueError("it does not end where its rows do; is it complete?")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON or JSONL in UTF-8, after {len(spans)} rows: {error}") from None
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
