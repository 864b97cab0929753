"""The visual token pool: learned rows, what they start from, and which of them are used.

Shapes: P rows, D width of the LLM.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import ModelError

Init = Literal["features", "unit_gaussian", "gaussian"]

RECENT = 100
"""Steps in which a row must have been matched to count as used."""

_OFF = 0.01
"""How far a copy is from what it copies, in norms."""
_ADAM = 16
"""Bytes a value of a trained parameter: itself, its gradient, two moments of Adam."""
_COST = 4 + 8
"""Bytes a cost: where it is made, and in the solver's double precision."""


class Pool(nn.Module):
    """`rows` `[P, D]`. Buffers `[P]`, kept with it: `uses` of a row since it began, `unused_for` how many steps.

    `unit`: rows count by their direction alone; they start with norm 1, and `candidates` have it always.
    """

    uses: Tensor
    unused_for: Tensor

    def __init__(self, size: int, width: int, init: Init, unit: bool) -> None:
        super().__init__()
        self.unit = unit
        rows = torch.randn(size, width)
        self.rows = nn.Parameter(rows if init == "gaussian" and not unit else F.normalize(rows, dim=-1))
        self.register_buffer("uses", torch.zeros(size, dtype=torch.long))
        self.register_buffer("unused_for", torch.zeros(size, dtype=torch.long))

    def candidates(self) -> Tensor:
        """`[P, D]`: what tokens are compared with."""
        return F.normalize(self.rows, dim=-1) if self.unit else self.rows

    def start(self, tokens: Tensor) -> None:
        """Takes P tokens `[P, D]` as its rows, each `_OFF` of its norm off: no two rows are the same.

        Of equal rows the rounding of a sum would choose one, on other hardware another.
        """
        rows = _beside(tokens, torch.randn(tokens.shape).to(tokens))
        with torch.no_grad():
            self.rows.copy_(F.normalize(rows, dim=-1) if self.unit else rows)

    def count(self, uses: Tensor) -> None:
        """Takes note of the matches of one step, `[P]` int64."""
        self.uses += uses
        self.unused_for.copy_(torch.where(uses > 0, 0, self.unused_for + 1))

    def used(self) -> float | None:
        """Share of rows with a match in the last `RECENT` steps; None before the first step."""
        if not bool(self.uses.any()):
            return None
        return float(((self.uses > 0) & (self.unused_for < RECENT)).double().mean())

    def revive(self, patience: int, uses: Tensor, random: torch.Generator) -> None:
        """Rows without a match for `patience` steps become copies of rows that this step used, `_OFF` of the norm off.

        Rows are drawn in proportion to `uses` `[P]`, from a CPU generator: the same on every process.
        """
        dead = (self.unused_for >= patience).nonzero()[:, 0]
        if not dead.numel() or not bool(uses.any()):
            return
        parents = torch.multinomial(uses.double().cpu(), dead.numel(), replacement=True, generator=random)
        rows = self.rows.detach()[parents.to(dead.device)]
        noise = torch.randn(rows.shape, generator=random).to(rows)
        with torch.no_grad():
            self.rows.index_copy_(0, dead, _beside(rows, noise))
        self.uses.index_fill_(0, dead, 0)
        self.unused_for.index_fill_(0, dead, 0)


def _beside(rows: Tensor, noise: Tensor) -> Tensor:
    """Rows moved in the direction of the noise, by a share of their norm."""
    return rows + _OFF * rows.norm(dim=-1, keepdim=True) * F.normalize(noise, dim=-1)


def check_memory(size: int, width: int, tokens: int, available: int) -> None:
    """Raises `ModelError` where a pool of `size` rows cannot be trained in `available` bytes.

    `tokens`: how many of an image are matched with it.
    """
    needed = size * (width * _ADAM + tokens * _COST)
    if needed > available:
        most = available // (width * _ADAM + tokens * _COST)
        raise ModelError(
            f"pool_size: {size:,} rows of width {width} need {needed / 2**30:,.1f} GiB (weights, gradients, the "
            f"optimizer's moments, and the costs of one image), and there are {available / 2**30:,.1f} GiB. "
            f"{most:,} rows are the most that fit without a model; 2048 are the paper's."
        )
