"""What a stage tries before its first step, so that memory or disk fails now and not after hours.

The largest micro-batches go forward and backward, the optimizer's state is allocated, a checkpoint is written. Nothing
of it leaves a trace: weights, buffers, random states and the optimizer are afterwards what they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from foveate.errors import RunError, TrainingError

_KEPT = 2  # checkpoints of a stage, beside the one that is being written


@contextmanager
def without_a_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards the module has no gradients, and its buffers and the random states are what they were before."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        yield
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name])
    module.zero_grad(set_to_none=True)


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """An allocation that fails is a `TrainingError` that names `what` needed it."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"out of memory in {what}. Lower hardware.tokens_per_microbatch (it changes no gradient) or set "
            f"hardware.gradient_checkpointing: true, and go on with --resume; or train fewer parts. {said}"
        ) from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is an allocation that failed; the CPU's has no type of its own."""
    if error is None:
        return False
    told = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't" in str(error)
    return told or _is_out_of_memory(error.__cause__)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the state of its first step, and a gradient of zeros, as between two micro-batches.

    A step of zero gradients at rate zero moves nothing. What a checkpoint has brought stays as it is.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def check_space(checkpoint: Path, to_come: int) -> int:
    """The size of `checkpoint` in bytes. Raises `RunError` where the disk has no room for the `to_come` next ones."""
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    free, more = shutil.disk_usage(checkpoint).free, min(to_come, _KEPT) * size
    if free < more:
        raise RunError(
            f"{checkpoint.parent}: a checkpoint takes {size / 1e9:.2f} GB; {_KEPT} are kept beside the one that is "
            f"being written, which needs {more / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free. Free space, or "
            "give the run another `output`."
        )
    return size
