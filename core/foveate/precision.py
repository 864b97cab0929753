"""Dtypes of parts: trained ones in full precision, frozen ones in the dtype that the recipe gives, without loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class FrozenParts:
    """Casts frozen parts down and back up. What a cast would round off waits in main memory until it is needed."""

    def __init__(self, full: torch.dtype, frozen: torch.dtype) -> None:
        self.full, self.frozen = full, frozen
        self._kept: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def freeze(self, name: str, part: nn.Module) -> None:
        """Cast `part` to the frozen dtype; full-precision values that it cannot hold are kept aside."""
        kept = self._kept.setdefault(name, {})
        for key, tensor in part.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and tensor.dtype is self.full:
                if not torch.equal(tensor.to(self.frozen).to(self.full), tensor):
                    kept[key] = tensor.detach().cpu().clone()
        part.to(self.frozen)

    @torch.no_grad()
    def thaw(self, name: str, part: nn.Module) -> None:
        """Cast `part` back to full precision, exactly as it was."""
        part.to(self.full)
        own = part.state_dict(keep_vars=True)
        for key, tensor in self._kept.pop(name, {}).items():
            own[key].copy_(tensor)
