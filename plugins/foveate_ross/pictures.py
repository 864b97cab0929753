"""Pictures of ROSS for people: sheets of labelled tiles, and colours for target rows that no decoder reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA
from torch import Tensor

from foveate import Grid

LEAST, GAP, TEXT = 224, 8, 14
"""Pixels: the shorter side of a tile at least, between tiles, and the height of labels."""

Tile = tuple[str, Image.Image]
"""A label and what it stands above."""


def sheet(tiles: Sequence[Tile]) -> Image.Image:
    """Tiles side by side, all of the size and shape of the first (or larger, where that is small), under labels."""
    first = tiles[0][1]
    scale = max(1.0, LEAST / min(first.size))
    width, height = (round(scale * side) for side in first.size)
    page = Image.new("RGB", (GAP + len(tiles) * (width + GAP), height + TEXT + 3 * GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for number, (label, image) in enumerate(tiles):
        left = GAP + number * (width + GAP)
        pen.text((left, GAP // 2), label, "black", font)
        page.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, TEXT + 2 * GAP))
    return page


def photograph(pixels_3HW: Tensor) -> Image.Image:
    """Pixels in 0…1 as a picture."""
    values = (pixels_3HW.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def components(target_NC: Tensor, made_NC: Tensor, grid: Grid) -> tuple[Image.Image, Image.Image]:
    """Both as maps in red, green and blue: their first three principal components, fitted on the target.

    One scale for both: what the target spans is black to full colour, what lies beyond is cut.
    """
    target, made = (rows.detach().double().cpu().numpy() for rows in (target_NC, made_NC))
    count = min(3, *target.shape)
    with np.errstate(invalid="ignore"):  # the shares of no variance, which nobody reads
        fitted = PCA(count, svd_solver="full").fit(target)
    seen, drawn = fitted.transform(target), fitted.transform(made)
    least, span = seen.min(0), np.maximum(np.ptp(seen, 0), 1e-12)
    return _colours((seen - least) / span, grid), _colours((drawn - least) / span, grid)


def _colours(values_NF: NDArray[np.float64], grid: Grid) -> Image.Image:
    """Up to three values in 0…1 a token as squares of colour."""
    rgb = np.zeros((*grid, 3), dtype=np.uint8)
    rgb[..., : values_NF.shape[1]] = (values_NF.clip(0, 1) * 255).round().reshape(*grid, -1)
    factor = -(-LEAST // min(grid))
    return Image.fromarray(rgb).resize((grid[1] * factor, grid[0] * factor), Image.Resampling.NEAREST)
