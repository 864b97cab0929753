"""The heads that reconstruct visual tokens from the LLM's states at their positions.

Shapes: I images, N visual tokens of an image, R = I*N rows, D width of the LLM.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STD = 0.02
_HEAD_WIDTH = 64


class LinearHead(nn.Linear):
    """One linear layer, D to D; weights start as a language model's do, N(0, 0.02²)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__(width, width)
        nn.init.normal_(self.weight, std=_STD)
        nn.init.zeros_(self.bias)


class TransformerHead(nn.Module):
    """The first version's: a learned table of positions, one BERT layer over the tokens of an image, a linear layer.

    Croc (arXiv 2410.14332v1): heads of width 64, an MLP of 4 D, norms after the additions; without dropout.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        wanted = max(1, width // _HEAD_WIDTH)
        heads = next(number for number in range(wanted, 0, -1) if width % number == 0)
        self.positions = nn.Parameter(torch.randn(tokens, width) * _STD)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, layer_norm_eps=1e-12
        )
        self.out = LinearHead(width, tokens)

    def forward(self, states_RD: Tensor) -> Tensor:
        """`[R, D]` → `[R, D]`; no image sees another one."""
        states_IND = states_RD.unflatten(0, (-1, len(self.positions))) + self.positions
        made: Tensor = self.out(self.layer(states_IND))
        return made.flatten(0, 1)


HEADS = {"linear": LinearHead, "transformer": TransformerHead}
