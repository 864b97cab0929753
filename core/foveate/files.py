"""Files that are complete or absent: written aside, flushed to the disk, then renamed; and sealed against damage."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foveate.errors import RunError

SEAL = "complete.json"
"""The file of a folder that holds the size and the SHA-256 of all others."""


@contextmanager
def atomic_folder(path: Path, seal: bool = True) -> Iterator[Path]:
    """A new folder beside `path` to write into; it replaces `path`, whole, when the block ends well.

    With `seal` it gets `complete.json`, for `check_seal`. When the block fails, `path` is as it was. Raises `RunError`
    where the disk is full or not writable.
    """
    aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        probe = aside / "mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        with disk_errors():
            yield aside
        if seal:
            sealed = {str(file.relative_to(aside)): _facts(file) for file in sorted(aside.rglob("*")) if file.is_file()}
            (aside / SEAL).write_text(json.dumps({"format": 1, "files": sealed}, indent=2) + "\n", encoding="utf-8")
        for folder, _, files in os.walk(aside):
            for name in files:
                Path(folder, name).chmod(mode)  # safetensors lets nobody else read what it writes
            for name in (*files, ""):
                _flush(Path(folder, name))
        if path.exists():
            path.rename(old)
        aside.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for rest in (aside, old):
            shutil.rmtree(rest, ignore_errors=True)


def check_seal(folder: Path, advice: str) -> list[str]:
    """Names of the files of a sealed folder, each as it was written.

    Raises `RunError` that names the file which is missing or damaged, followed by `advice`.
    """
    try:
        sealed = read_json(folder / SEAL)
        files, known = dict(sealed["files"]), sealed["format"] == 1
    except (RunError, LookupError, TypeError, ValueError):
        known = False
    if not known:
        reason = "is damaged, or of another release of foveate" if (folder / SEAL).is_file() else "is missing"
        raise RunError(f"{folder / SEAL} {reason}. It tells whether the other files are whole. {advice}")
    for name, facts in files.items():
        try:
            found = _facts(folder / name)
        except OSError as error:
            raise RunError(f"{folder / name} cannot be read: {error.strerror}. {advice}") from error
        if found != facts:
            raise RunError(f"{folder / name} is damaged: written as {facts}, it is now {found}. {advice}")
    return list(files)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def disk_errors() -> Iterator[None]:
    """safetensors and tokenizers, written in Rust, tell a full disk by exceptions of their own: an `OSError` here."""
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told and not isinstance(error, OSError):
            raise OSError(int(told[1]), os.strerror(int(told[1]))) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path`, whole or not at all. Raises `RunError` where the disk is full or not writable."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()  # part of a file would take the room that is missing
        raise _unwritable(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Replace the JSON file at `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `RunError` where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        told = "It is damaged, or not what foveate wrote: restore it from a copy."
        raise RunError(f"{path} cannot be read: {error}. {told}") from error


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> RunError:
    reason = error.strerror or str(error)
    return RunError(f"{path} cannot be written: {reason}. Free space or make it writable; what was there still is.")
