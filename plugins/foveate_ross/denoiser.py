"""The denoisers of ROSS: networks that predict what is in noisy target rows, given the LLM's states at their tokens.

The paper (figure 4b) and its release differ: the release has `Dit`, the paper describes `Vit`; `Mlp` is the
attention-free one of the paper's figure 10. All end in a linear map that starts at zero, so that the first prediction
is zero, and the first loss of noise prediction 1. The table of positions is fixed: a buffer, never trained.

`condition` does what depends on the LLM's states alone, once an image; `forward` the rest, once a draw.

Shapes: I images of one grid (h, w), N = h*w visual tokens, K draws of an image, C width of a target row, D of the LLM,
W of the denoiser.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import Grid
from foveate_ross.options import TIMES, DenoiserOptions

CLOCK = 256
"""Width of the sinusoids that tell the timestep."""


class Denoiser(nn.Module):
    """What all denoisers share: entry, clock, positions, exit, and how weights start."""

    positions: Tensor
    clock: Tensor

    def __init__(self, options: DenoiserOptions, rows: int, llm_width: int, grid: Grid):
        """`rows`: C, width of a target row. `grid`: the usual one; others are possible."""
        super().__init__()
        width = options.width
        self.grid, self.llm_width, self.width = grid, llm_width, width
        self.time = nn.Sequential(nn.Linear(CLOCK, width), nn.SiLU(), nn.Linear(width, width))
        self.exit = nn.Linear(width, rows)
        self.register_buffer("positions", position_table(grid, width), persistent=False)
        self.register_buffer("clock", clock_table(), persistent=False)

    def condition(self, states_IND: Tensor) -> Any:
        """The LLM's states as `forward` wants them: all that does not depend on the noise."""
        raise NotImplementedError

    def forward(self, noisy_IKNC: Tensor, times_IK: Tensor, condition: Any, grid: Grid) -> Tensor:
        """The prediction `[I, K, N, C]`; `times_IK` int64 in 0…999, `condition` of the method of that name."""
        raise NotImplementedError

    def _normed(self, states_IND: Tensor) -> Tensor:
        return F.layer_norm(states_IND, (self.llm_width,), eps=1e-5)

    def _times(self, times_IK: Tensor) -> Tensor:
        """`[I, K, W]`."""
        made: Tensor = self.time(self.clock[times_IK].to(self.exit.weight.dtype))
        return made

    def _positions(self, grid: Grid) -> Tensor:
        """`[N, W]`."""
        table = self.positions if grid == self.grid else position_table(grid, self.width)
        return table.to(self.exit.weight)

    def _start(self, *zero: nn.Linear) -> None:
        """Xavier weights, zero biases; the clock's weights from N(0, 0.02); `zero` and the exit at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.time[0].weight, self.time[2].weight):
            nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]
        for layer in (*zero, self.exit):
            nn.init.zeros_(layer.weight)


class Dit(Denoiser):
    """The release's denoiser: blocks of attention and MLP, modulated by c = time + condition, a vector for each token.

    adaLN-Zero: SiLU and a linear map of c, zero at first, give shift, scale and gate of both halves of each block, and
    shift and scale before the exit. `heads` None: blocks without attention.
    """

    def __init__(self, options: DenoiserOptions, rows: int, llm_width: int, grid: Grid):
        super().__init__(options, rows, llm_width, grid)
        width = self.width
        self.enter, self.state = nn.Linear(rows, width), nn.Linear(llm_width, width)
        self.blocks = nn.ModuleList(_ModulatedBlock(width, options.heads) for _ in range(options.depth))
        self.modulation = nn.Linear(width, 2 * width)
        self._start(self.modulation, *(block.modulation for block in self.blocks))  # type: ignore[arg-type]
        nn.init.normal_(self.state.weight, std=0.02)

    def condition(self, states_IND: Tensor) -> Tensor:
        """`[I, 1, N, W]`."""
        made: Tensor = self.state(F.silu(self._normed(states_IND)))
        return made[:, None]

    def forward(self, noisy_IKNC: Tensor, times_IK: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        x_IKNW = self.enter(noisy_IKNC) + self._positions(grid)
        c_IKNW = F.silu(self._times(times_IK)[:, :, None] + condition)
        for block in self.blocks:
            x_IKNW = block(x_IKNW, c_IKNW)
        made: Tensor = self.exit(_modulated(x_IKNW, *self.modulation(c_IKNW).chunk(2, -1)))
        return made


class Mlp(Dit):
    """The attention-free denoiser of the paper's ablation: `Dit` without the attention of its blocks."""


class _ModulatedBlock(nn.Module):
    """Attention, unless `heads` is None, and an MLP; norm and residual of each are modulated by c.

    One matrix for the modulations of all blocks was no faster, and held all of their gradients at once.
    """

    def __init__(self, width: int, heads: int | None):
        super().__init__()
        self.attention = None if heads is None else _Attention(width, heads)
        self.mlp = _mlp(width)
        self.modulation = nn.Linear(width, (3 if heads is None else 6) * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """`c`: the SiLU of it, of the shape of `x`."""
        *first, shift, scale, gate = self.modulation(c).split(x.shape[-1], -1)
        if self.attention is not None:
            x = torch.addcmul(x, first[2], self.attention(_modulated(x, *first[:2])))
        return torch.addcmul(x, gate, self.mlp(_modulated(x, shift, scale)))


class Vit(Denoiser):
    """The paper's denoiser: pre-norm Transformer blocks; each adds projections of condition, noisy rows and time first.

    The stream begins with the table of positions. Only one of a block's three projections has a bias, since they are
    added up.
    """

    def __init__(self, options: DenoiserOptions, rows: int, llm_width: int, grid: Grid):
        super().__init__(options, rows, llm_width, grid)
        assert options.heads is not None
        made = [_ProjectingBlock(self.width, options.heads, rows, llm_width) for _ in range(options.depth)]
        self.blocks, self.norm = nn.ModuleList(made), nn.LayerNorm(self.width, eps=1e-6)
        self._start()

    def condition(self, states_IND: Tensor) -> list[Tensor]:
        """`[I, 1, N, W]` for each block."""
        normed = self._normed(states_IND)[:, None]
        return [block.condition(normed) for block in self.blocks]  # type: ignore[operator]

    def forward(self, noisy_IKNC: Tensor, times_IK: Tensor, condition: list[Tensor], grid: Grid) -> Tensor:
        times_IK1W, x = F.silu(self._times(times_IK))[:, :, None], self._positions(grid)
        for block, states in zip(self.blocks, condition, strict=True):
            x = block(x, states, noisy_IKNC, times_IK1W)
        made: Tensor = self.exit(self.norm(x))
        return made


class _ProjectingBlock(nn.Module):
    """What the paper's figure 4b shows: three projections into the stream, then self-attention and MLP."""

    def __init__(self, width: int, heads: int, rows: int, llm_width: int):
        super().__init__()
        self.condition = nn.Linear(llm_width, width)
        self.noisy, self.time = nn.Linear(rows, width, bias=False), nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention, self.mlp = _Attention(width, heads), _mlp(width)

    def forward(self, x: Tensor, states: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """`states`: what `condition` made of them."""
        x = x + states + self.time(times) + self.noisy(noisy)
        x = x + self.attention(self.norms[0](x))
        made: Tensor = x + self.mlp(self.norms[1](x))
        return made


class _Attention(nn.Module):
    """Self-attention over the tokens of a draw, in both directions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.flatten(0, 1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).flatten(2)
        made: Tensor = self.out(seen)
        return made.unflatten(0, x.shape[:2])


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def position_table(grid: Grid, width: int) -> Tensor:
    """Fixed sines and cosines of a grid, `[h*w, width]` float64: half of the channels tell the column, half the row."""
    waves = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64)[:, None] * waves for size in grid)
    across, down = (torch.cat([angles.sin(), angles.cos()], -1) for angles in (columns, rows))
    table = torch.cat([across.expand(grid[0], -1, -1), down[:, None].expand(-1, grid[1], -1)], -1)
    return table.flatten(0, 1)


def clock_table() -> Tensor:
    """Cosines and sines of every timestep, `[1000, 256]` float64."""
    half = CLOCK // 2
    waves = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(TIMES, dtype=torch.float64)[:, None] * waves
    return torch.cat([angles.cos(), angles.sin()], -1)


DENOISERS: dict[str, type[Denoiser]] = {"dit": Dit, "vit": Vit, "mlp": Mlp}
