"""What a pool has learned, for people: image regions with one nearest row (the paper's figure 4), and the rows' use."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from foveate import Picture

MORE_THAN = 4
"""A region has more neighbouring patches than this."""

_ROWS, _COLUMNS = 16, 12
"""Of a contact sheet, at most."""
_SIDE, _GAP, _LABEL = 96, 6, 70
"""Pixels: of a crop, between crops, and of the text before them."""


@dataclass(frozen=True)
class Region:
    """Neighbouring patches (by edges) of image number `image` with the same nearest row `row` of the pool.

    `box`: their first and last rows and columns in the grid, as slices; `mask`: which patches inside the box they are.
    """

    row: int
    image: int
    box: tuple[slice, slice]
    mask: np.ndarray

    @property
    def patches(self) -> int:
        """How many they are."""
        return int(self.mask.sum())


def regions(maps: Sequence[np.ndarray], more_than: int = MORE_THAN) -> list[Region]:
    """All regions of more than `more_than` patches; `maps`: the nearest row of every patch, `[h, w]` an image."""
    found = []
    for number, nearest in enumerate(maps):
        for row in np.unique(nearest):
            labels, _ = ndimage.label(nearest == row)
            for label, box in enumerate(ndimage.find_objects(labels), 1):
                mask = labels[box] == label
                if mask.sum() > more_than:
                    found.append(Region(int(row), number, box, mask))
    return found


def contact_sheet(images: Sequence[Image.Image], maps: Sequence[np.ndarray]) -> list[Picture]:
    """One sheet: a line a row of the pool, those with most regions first, each region cut out of its image.

    What of a crop does not belong to the region is dimmed. No sheet where no image has a region.
    """
    groups: dict[int, list[Region]] = {}
    for region in regions(maps):
        groups.setdefault(region.row, []).append(region)
    if not groups:
        return []
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), -sum(r.patches for r in item[1]), item[0]))
    shown = ordered[:_ROWS]
    columns = min(_COLUMNS, max(len(group) for _, group in shown))
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (_LABEL + columns * step, _GAP + len(shown) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (row, group) in enumerate(shown):
        top = _GAP + line * step
        told = f"row {row}\n{len(group)} region{'s' * (len(group) > 1)}"
        draw.text((_GAP, top + _SIDE // 2 - 12), told, fill="black")
        largest = sorted(group, key=lambda region: -region.patches)[:columns]
        for column, region in enumerate(largest):
            crop = _crop(images[region.image], region, maps[region.image].shape)
            left = _LABEL + column * step + (_SIDE - crop.width) // 2
            sheet.paste(crop, (left, top + (_SIDE - crop.height) // 2))
    count = sum(map(len, groups.values()))
    title = f"{count} regions of more than {MORE_THAN} patches with one nearest row, {len(groups)} rows of the pool"
    return [Picture(f"{title}, {len(images)} images", sheet)]


def _crop(image: Image.Image, region: Region, grid: tuple[int, ...]) -> Image.Image:
    """The region's box, its other patches dimmed, at most `_SIDE` pixels wide and high."""
    down, right = region.box
    across, up = image.width / grid[1], image.height / grid[0]
    box = (right.start * across, down.start * up, right.stop * across, down.stop * up)
    scale = _SIDE / max(box[2] - box[0], box[3] - box[1])
    size = max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale))
    crop = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=box)
    mask = Image.fromarray(np.where(region.mask, 255, 50).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return Image.composite(crop, Image.new("RGB", size, "white"), mask)


def usage(uses: np.ndarray) -> list[Picture]:
    """How often each row has been matched, the most used first; `uses` `[P]`. Nothing before the first step."""
    if not uses.any():
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    shares = np.sort(uses)[::-1] / uses.sum()
    axes.fill_between(np.arange(len(uses)), shares, step="post", color="#2764c8", alpha=0.8, linewidth=0)
    axes.axhline(1 / len(uses), color="#c2571a", linewidth=1, label="even use")
    axes.set(xlabel="rows of the pool, the most used first", ylabel="share of matches", xlim=(0, len(uses)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    title = f"use of the pool in training: {np.count_nonzero(uses):,} of {len(uses):,} rows"
    return [Picture(title, Image.open(data).convert("RGB"))]
