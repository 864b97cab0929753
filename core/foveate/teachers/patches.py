"""Teacher `patches`: the raw pixels under each visual token; and how pictures, maps and rows become one another.

Shapes: I images, (h, w) grid of visual tokens, N = h*w, P side of a visual token's square in pixels (or latents).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from foveate.errors import ModelError
from foveate.objective import ObjectiveContext, Teacher, TeacherInputs, TeacherSpec
from foveate.options import Options
from foveate.types import Grid, ImageRecord


class PatchOptions(Options):
    """The raw pixels of each visual token's patch, in -1…1."""

    patch_px: int = Field(16, gt=0, description="Side of a visual token's patch in pixels; the picture is resized.")
    normalize: bool = Field(False, description="Each patch to mean 0 and variance 1. It cannot be decoded then.")


class PatchTeacher(Teacher):
    """Records `patches` `[N, 3*P*P]`: channel (red, green, blue) by channel, inside of it row by row."""

    Options = PatchOptions

    @classmethod
    def describe(cls, options: PatchOptions, context: ObjectiveContext) -> TeacherSpec:
        (rows, columns), side = context.visual_grid, options.patch_px
        return TeacherSpec(3 * side * side, context.visual_grid, (rows * side, columns * side))

    @classmethod
    def prepare_image(cls, options: PatchOptions, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """`pixels`, `[3, h*P, w*P]` uint8."""
        return {"pixels": resized(image, record.grid, options.patch_px)}

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        rows = to_rows(signed(inputs.stack("pixels"), torch.float32), self.options.patch_px)
        if self.options.normalize:
            rows = F.layer_norm(rows, rows.shape[-1:], eps=1e-6)
        return [{"patches": patches} for patches in rows]

    def decode(self, target: Tensor) -> Tensor:
        if self.options.normalize:
            raise ModelError("teacher patches with `normalize: true` cannot be decoded: each patch lost its mean")
        return unit(to_maps(target, self.context.visual_grid, self.options.patch_px))


def resized(image: Image.Image, grid: Grid, side: int) -> Tensor:
    """An RGB picture as `[3, h*side, w*side]` uint8, bicubic."""
    size = (grid[1] * side, grid[0] * side)
    array = np.array(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def signed(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels as -1…1, computed in float32 or more."""
    return (pixels.to(torch.promote_types(dtype, torch.float32)) / 127.5 - 1).to(dtype)


def unit(pixels: Tensor) -> Tensor:
    """Pixels around -1…1 as 0…1: clamped, but the gradient passes as if they were not, so that none is lost."""
    pixels = (full(pixels) + 1) / 2
    return pixels + (pixels.clamp(0, 1) - pixels).detach()


def to_rows(maps: Tensor, side: int) -> Tensor:
    """`[I, C, h*side, w*side]` → `[I, h*w, C*side*side]`; entry c*side*side + row*side + column of a row."""
    return F.pixel_unshuffle(maps, side).flatten(2).transpose(1, 2)


def to_maps(rows: Tensor, grid: Grid, side: int) -> Tensor:
    """The inverse of `to_rows`."""
    return F.pixel_shuffle(rows.transpose(1, 2).unflatten(2, grid), side)


def full(tensor: Tensor) -> Tensor:
    """In float32 or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
