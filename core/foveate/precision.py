"""Where parts compute, in which dtype: trained ones in full precision, frozen ones as the recipe says, without loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.errors import UserError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name, such as `cuda:1`; default: the accelerator, where there is one. Raises `UserError`."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None


class FrozenParts:
    """Casts frozen parts down and back up. What a cast would round off waits in main memory until it is needed.

    Parameters and persistent buffers are cast in place, so that optimizers and adapters keep pointing at them;
    non-persistent buffers (rotary frequencies) stay as they are.
    """

    def __init__(self, full: torch.dtype, frozen: torch.dtype) -> None:
        self.full, self.frozen = full, frozen
        self._kept: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def freeze(self, name: str, part: nn.Module) -> None:
        """Cast `part` to the frozen dtype; values that it cannot hold are kept aside."""
        kept = self._kept.setdefault(name, {})
        for tensor in _floats(part):
            if tensor.dtype is self.full and not torch.equal(tensor.to(self.frozen).to(self.full), tensor):
                kept[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)
            tensor.data = tensor.data.to(self.frozen)

    def value(self, tensor: Tensor) -> Tensor:
        """The full-precision value behind a tensor of a part, frozen or not."""
        found = [kept[id(tensor)][1] for kept in self._kept.values() if id(tensor) in kept]
        return found[0] if found else tensor.detach()

    @torch.no_grad()
    def thaw(self, name: str, part: nn.Module) -> None:
        """Cast `part` to full precision, its values exactly as they were before `freeze`."""
        for tensor in _floats(part):
            tensor.data = tensor.data.to(self.full)
        for tensor, value in self._kept.pop(name, {}).values():
            tensor.copy_(value)


def _floats(part: nn.Module) -> list[Tensor]:
    unique = {id(tensor): tensor for tensor in part.state_dict(keep_vars=True).values() if tensor.is_floating_point()}
    return list(unique.values())
