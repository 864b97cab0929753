"""The projector: encoder features to visual tokens of the LLM's width.

Shapes: I images, h*w features of an image, h'*w' visual tokens of an image, C width of the encoder, D of the LLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foveate.errors import ModelError
from foveate.options import Options
from foveate.types import Grid


class Projector(nn.Module, ABC):
    """Base of projectors. `grid` is the grid of the features that come in; `out_grid` that of the visual tokens."""

    Options: type[Options] = Options

    @classmethod
    def out_grid(cls, options: Any, grid: Grid) -> Grid:
        """The grid of visual tokens for a grid of features, from options alone. Raises `ModelError`."""
        return grid

    @abstractmethod
    def __init__(self, options: Any, in_width: int, out_width: int, grid: Grid) -> None:
        """`in_width` is C, `out_width` is D."""
        super().__init__()

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Visual tokens: `[I, h*w, C]` → `[I, h'*w', D]`."""

    @abstractmethod
    def portable_options(self) -> dict[str, Any]:
        """Options that rebuild this module."""


class LinearOptions(Options):
    """One linear layer."""

    bias: bool = Field(True, description="Linear layers have a bias.")
    normalize: bool = Field(False, description="Scale every visual token to L2 norm 1.")


class MLPOptions(LinearOptions):
    """`depth` linear layers, as wide as the LLM, with GELU between them; 2 is LLaVA-1.5's projector."""

    depth: int = Field(2, ge=1, le=64, description="Linear layers; GELU between them.")


class PixelShuffleOptions(MLPOptions):
    """Joins squares of neighbouring features into one visual token, then an MLP."""

    factor: int = Field(2, ge=1, description="Side of the squares: factor² features become one visual token.")


class LinearProjector(Projector):
    """Linear layers over every feature by itself; those of `mlp` and `pixel_shuffle_mlp` too.

    State-dict keys are ``layers.0``, ``layers.2``, …: GELUs have the odd numbers.
    """

    Options = LinearOptions

    def __init__(self, options: LinearOptions, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(options, in_width, out_width, grid)
        self.options = options
        layers: list[nn.Module] = [nn.Linear(in_width, out_width, bias=options.bias)]
        for _ in range(getattr(options, "depth", 1) - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width, bias=options.bias)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        # a frozen encoder may run in another dtype than a projector that is trained
        tokens = self.layers(features.to(next(self.parameters()).dtype))
        if self.options.normalize:
            # the sum of D squares would lose digits in half precision
            wide = tokens.float() if tokens.dtype.itemsize < 4 else tokens
            tokens = F.normalize(wide, dim=-1).to(tokens.dtype)
        return tokens

    def portable_options(self) -> dict[str, Any]:
        return self.options.model_dump(mode="json")


class MLPProjector(LinearProjector):
    """Linear layers with GELU between them."""

    Options = MLPOptions


class PixelShuffleProjector(LinearProjector):
    """Space to depth, then an MLP: `factor`² neighbouring features, row by row, become the channels of one token."""

    Options = PixelShuffleOptions

    @classmethod
    def out_grid(cls, options: PixelShuffleOptions, grid: Grid) -> Grid:
        if any(side % options.factor for side in grid):
            raise ModelError(
                f"pixel_shuffle_mlp with factor {options.factor} cannot divide the encoder's {grid[0]}×{grid[1]} grid; "
                f"take a factor that divides both sides, or another encoder"
            )
        return grid[0] // options.factor, grid[1] // options.factor

    def __init__(self, options: PixelShuffleOptions, in_width: int, out_width: int, grid: Grid) -> None:
        rows, columns = self.out_grid(options, grid)
        super().__init__(options, in_width * options.factor**2, out_width, grid)
        self.squares = (rows, options.factor, columns, options.factor)

    def forward(self, features: Tensor) -> Tensor:
        squares = features.unflatten(1, self.squares).transpose(2, 3)
        return super().forward(squares.flatten(3, 5).flatten(1, 2))
