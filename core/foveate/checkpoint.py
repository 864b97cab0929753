"""Checkpoints of a stage: safetensors and JSON, complete or absent, checked when they are read; never unpickled.

`STAGE/checkpoints/step-N/` holds `NAME.safetensors` for each group of tensors, `state.json`, and the seal
`complete.json` with every file's size and SHA-256.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.errors import RunError
from foveate.files import SEAL, atomic_folder, check_seal, read_json, write_json

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given: tensors on the CPU by file name and key, and the JSON state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises `RunError` where it is missing or broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}. It is damaged, or not what foveate wrote.") from error


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
    for old in _complete(folder.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint and checks every file's size and SHA-256.

    Raises `RunError` that names the file which is missing, damaged or incomplete, and says how to go on.
    """
    step = int(folder.name.rpartition("-")[2])
    earlier = [path for path in _complete(folder.parent) if int(path.name[5:]) < step]
    goes_on = f"the checkpoint before it, {earlier[-1].name}" if earlier else "what is before it, or from the start"
    files = check_seal(folder, f"Delete {folder}: --resume then goes on from {goes_on}.")
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
    save_file(written, path, metadata={"tied": json.dumps(tied)})


def _load_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tied: dict[str, str] = json.loads((file.metadata() or {}).get("tied", "{}"))
    return tensors | {key: tensors[other] for key, other in tied.items()}
