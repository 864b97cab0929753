"""Checkpoints of a stage: safetensors and JSON, complete or absent, checked when they are read; never unpickled.

`STAGE/checkpoints/step-N/` holds `NAME.safetensors` for each group of tensors, `state.json`, and `complete.json` with
every file's size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import RunError
from foveate.files import atomic_folder, read_json, write_json

SEAL, STATE = "complete.json", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given: tensors on the CPU by file name and key, and the JSON state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_folder(stage_folder: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step `step` of a stage lies."""
    return stage_folder / "checkpoints" / f"step-{step}"


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> None:
    """Writes a checkpoint to `folder` (`…/step-N`), then removes all but the newest `keep` beside it.

    A tensor under several keys (tied weights) is written once. Raises `RunError` when the disk is full or not
    writable; the checkpoints before it are untouched then.
    """
    with atomic_folder(folder) as aside:
        for name, group in tensors.items():
            _save_tensors(group, aside / f"{name}.safetensors")
        write_json(aside / STATE, dict(state))
        write_json(aside / SEAL, {"format": 1, "files": {path.name: _facts(path) for path in sorted(aside.iterdir())}})
    for old in _complete(folder.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint and checks every file's size and SHA-256.

    Raises `RunError` that names the file which is missing, damaged or incomplete, and says how to go on.
    """
    files = read_json(folder / SEAL)["files"]
    for name, facts in files.items():
        found = _facts(folder / name) if (folder / name).is_file() else "missing"
        if found != facts:
            raise RunError(
                f"{folder / name} is damaged: written as {facts}, it is now {found}. "
                f"Delete {folder} to resume from the checkpoint before it."
            )
    tensors = {Path(name).stem: _load_tensors(folder / name) for name in files if name.endswith(".safetensors")}
    return Checkpoint(tensors, read_json(folder / STATE))


def latest_checkpoint(stage_folder: Path) -> Path | None:
    """The complete checkpoint of a stage with the highest step, or None."""
    found = _complete(stage_folder / "checkpoints")
    return found[-1] if found else None


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{SEAL}") if path.parent.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as tensors `KEY/PARAMETER`; `names` maps state-dict names to the optimizer's parameters.

    Learning rates are not in it: they are a function of recipe and step. A parameter that was never stepped leaves an
    empty tensor `none/PARAMETER`.
    """
    states = {name: optimizer.state.get(parameter) or {"none": torch.empty(0)} for name, parameter in names.items()}
    return {f"{key}/{name}": torch.as_tensor(value) for name, state in states.items() for key, value in state.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], flat: Mapping[str, Tensor]
) -> None:
    """Puts what `optimizer_state` returned back. Raises `RunError` where parameters or shapes differ."""
    states: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in flat.items():
        key, _, name = entry.partition("/")
        states.setdefault(name, {})[key] = tensor
        if name in names and tensor.ndim and key != "none" and tensor.shape != names[name].shape:
            raise RunError(f"{key} of {name} has shape {tuple(tensor.shape)}, needed {tuple(names[name].shape)}.")
    if states.keys() != names.keys():
        missing, unknown = sorted(names.keys() - states.keys()), sorted(states.keys() - names.keys())
        raise RunError(
            "the checkpoint's optimizer state does not fit what this stage trains: "
            f"{len(missing)} parameters are missing ({', '.join(missing[:4])}), {len(unknown)} unknown "
            f"({', '.join(unknown[:4])}). Resume with the recipe that the run began with."
        )
    for name, parameter in names.items():
        optimizer.state.pop(parameter, None)
        if "none" not in states[name]:
            state = {key: tensor.to(parameter.device, copy=True) for key, tensor in states[name].items()}
            optimizer.state[parameter] = state


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _save_tensors(group: Mapping[str, Tensor], path: Path) -> None:
    """Tied tensors go into the file once; its metadata says which other keys they have."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    written: dict[str, Tensor] = {}
    for key, tensor in group.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and (other := first.setdefault(place, key)) != key:
            tied[key] = other
        else:
            copied = tensor.detach().contiguous().cpu()
            view = copied.untyped_storage().nbytes() != copied.nbytes  # safetensors wants a storage of its own
            written[key] = copied.clone() if view else copied
    try:
        save_file(written, path, metadata={"tied": json.dumps(tied)})
    except SafetensorError as error:  # the disk is full, for instance; it carries no errno
        raise OSError(str(error)) from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tied: dict[str, str] = json.loads((file.metadata() or {}).get("tied", "{}"))
    return tensors | {key: tensors[other] for key, other in tied.items()}
