"""Regions of one nearest row against a search of our own, and what the sheet shows of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from foveate_victor.pictures import contact_sheet, regions, usage


def components(values: np.ndarray) -> Iterator[set[tuple[int, int]]]:
    """Sets of cells with one value that touch by edges: a flood from each cell."""
    left = set(np.ndindex(*values.shape))
    while left:
        edge = [left.pop()]
        found = set(edge)
        while edge:
            y, x = edge.pop()
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            near = {cell for cell in near if values[cell] == values[y, x]}
            left -= near
            found |= near
            edge += near
        yield found


def test_regions_are_the_connected_ones_of_more_than_four_patches() -> None:
    rng = np.random.default_rng()
    maps = [rng.integers(3, size=(9, 11)) for _ in range(4)]
    found = {
        (region.image, region.row, frozenset((y + region.box[0].start, x + region.box[1].start)
        for y, x in np.argwhere(region.mask).tolist()))
        for region in regions(maps)
    }  # fmt: skip
    expected = {
        (number, int(values[next(iter(cells))]), frozenset(cells))
        for number, values in enumerate(maps)
        for cells in components(values)
        if len(cells) > 4
    }
    assert found == expected and expected


def test_diagonal_neighbours_do_not_touch() -> None:
    stairs = np.array([[7, 0, 0], [0, 7, 0], [0, 0, 7]])
    assert regions([stairs], more_than=0)[-1].patches == 1
    assert not [region for region in regions([stairs]) if region.row == 7]


def test_the_sheet_groups_by_row_and_cuts_out() -> None:
    """Two pictures, their left halves red and green; row 5 lies there in both, and stands first."""
    pictures, left = [], np.zeros((40, 40, 3), dtype=np.uint8)
    for colour in ((250, 0, 0), (0, 250, 0)):
        half = left.copy()
        half[:, :20] = colour
        pictures.append(Image.fromarray(half))
    nearest = [np.full((4, 4), 2), np.full((4, 4), 3)]
    for one in nearest:
        one[:, :2] = 5
    [sheet] = contact_sheet(pictures, nearest)
    assert sheet.title.startswith("4 regions of more than 4 patches with one nearest row, 3 rows of the pool, 2 images")
    pixels = np.asarray(sheet.image).astype(int)
    line = pixels[6:102]
    for colour in ((250, 0, 0), (0, 250, 0)):
        assert (np.abs(line - colour).sum(-1) < 30).sum() > 0.8 * 96 * 48, "row 5's crops are in the first line"
        assert not (np.abs(pixels[110:] - colour).sum(-1) < 30).any(), "and in no other"


def test_no_region_no_sheet_no_use_no_histogram() -> None:
    scattered = np.arange(16).reshape(4, 4)
    assert contact_sheet([Image.new("RGB", (8, 8))], [scattered]) == []
    assert usage(np.zeros(5, dtype=np.int64)) == []
    [picture] = usage(np.array([3, 0, 1]))
    assert picture.title == "use of the pool in training: 2 of 3 rows" and picture.image.width > 300
