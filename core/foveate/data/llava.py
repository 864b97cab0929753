"""LLaVA conversation files: one JSON array, or one JSON object a line. Rows are parsed when they are asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
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
_GAP = re.compile(r"[\s,]*")
_CHUNK = 1 << 24


class LlavaDataset(ConversationDataset):
    """A LLaVA-format JSON or JSONL file and the folder of its pictures."""

    class Options(ConversationDataset.Options):
        path: ExistingPath = Field(description="The JSON or JSONL file.")
        images: ExistingPath | None = Field(None, description="Folder of the pictures; default: the file's own.")

    options: Options

    def __init__(self, options: Options):
        super().__init__(options)
        self.folder = options.images or options.path.parent
        self._spans = row_spans(options.path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Conversation:
        path, (start, stop) = self.options.path, self._spans[index]
        with open(path, "rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise SampleError("row", f"{path.name} row {index}", f"is not valid JSON ({error})") from None
        picture = partial(picture_inside, self.folder)
        return conversation(row, f"{path.name} row {index}", f"{path.stem}-{index}", picture)

    def fingerprint(self) -> str:
        with open(self.options.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{digest[:24]}-{os.path.getsize(self.options.path)}"


def picture_inside(folder: Path | None, name: Any) -> Path:
    """The picture `name` of `folder`. Raises ValueError when it leads out of it, symbolic links followed."""
    if not isinstance(name, str) or not name or folder is None:
        raise ValueError(f"expected a picture's path, relative to the folder `images`, got {name!r} and {folder}")
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not path.startswith(os.path.join(root, "")):
        raise ValueError(f"picture {name!r} leads out of {root}: paths must be relative and stay inside the folder")
    return Path(path)


def conversation(row: Any, where: str, default_id: str, picture: Callable[[Any], Any]) -> Conversation:
    """A row's `Conversation`; `picture` turns an entry of its image list into an `ImageRef`'s source.

    Keys: `id`, `image` or `images` (one or a list), `roles` (parallel to it) or `target_images`, `conversations` or
    `messages`, `meta`; others are ignored. Raises `SampleError` of kind "row".
    """
    try:
        if not isinstance(row, Mapping):
            raise ValueError(f"expected an object, got {type(row).__name__}")
        where = f"{where} (id {row['id']!r})" if row.get("id") is not None else where
        names = _listed(_either(row, "image", "images"))
        roles = _listed(row.get("roles")) or ["input"] * len(names)
        if len(roles) != len(names) or not set(roles) <= {"input", "target"}:
            raise ValueError(f"'roles' must say 'input' or 'target' for each of {len(names)} images, got {roles}")
        pairs = [*zip(names, roles, strict=True), *((name, "target") for name in _listed(row.get("target_images")))]
        pairs.sort(key=lambda pair: pair[1] != "input")
        refs = tuple(ImageRef(picture(name), role) for name, role in pairs)
        turns = tuple(_turn(turn) for turn in _listed(_either(row, "conversations", "messages")))
        meta = row.get("meta") or {}
        if not isinstance(meta, Mapping):
            raise ValueError(f"'meta' must be an object, got {meta!r}")
    except ValueError as error:
        raise SampleError("row", where, str(error)) from None
    return Conversation(str(default_id if row.get("id") is None else row["id"]), turns, refs, meta)


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn must be an object with 'from' and 'value', got {turn!r}")
    role, text = _either(turn, "from", "role"), _either(turn, "value", "content")
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"a turn needs a text and one of {', '.join(_ROLES)} as its speaker, got {role!r}: {text!r}")
    return Turn(_ROLES[role], text)  # type: ignore[arg-type]


def _either(row: Mapping[str, Any], first: str, second: str) -> Any:
    if row.get(first) is not None and row.get(second) is not None:
        raise ValueError(f"has both {first!r} and {second!r}: keep one")
    return row.get(first) if row.get(first) is not None else row.get(second)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def row_spans(path: Path) -> np.ndarray:
    """Byte ranges `[rows, 2]` of the file's rows, found in one pass that keeps no row in memory.

    Raises `DataError` when an array is not valid JSON; a line of a JSONL file is checked when it is read.
    """
    try:
        with open(path, "rb") as file:
            is_array, end = file.read(4096).lstrip().startswith(b"["), file.seek(0)
            lines: Iterable[bytes] = () if is_array else file
            spans = [(end - len(line), end) for line in lines if (end := end + len(line)) and line.strip()]
        spans = _array_spans(path) if is_array else spans
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a JSON or JSONL file in UTF-8 ({error})") from None
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _array_spans(path: Path) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read(_CHUNK)
        at = text.index("[") + 1
        byte = len(text[:at].encode())
        while True:
            start = _GAP.match(text, at).end()  # type: ignore[union-attr]
            if text[start : start + 1] == "]":
                return spans
            try:
                _, stop = decode(text, start)
            except json.JSONDecodeError as error:
                more = file.read(max(_CHUNK, len(text)))  # the row may go on in the next chunk
                if not more:
                    problem = f"row {len(spans)}, after byte {byte}: {error.msg}"
                    raise DataError(f"{path} is not a valid JSON array ({problem}); is the file complete?") from None
                text, at = text[at:] + more, 0
                continue
            first = byte + len(text[at:start].encode())
            byte = first + len(text[start:stop].encode())
            spans.append((first, byte))
            at = stop
