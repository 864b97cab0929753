"""Scenes composed of real scanned digits, on a grid of cells.

The scans are scikit-learn's ``load_digits``: 1,797 handwritten digits of 8 x 8 pixels and 17 grey levels. Scenes of the
split ``train`` and of the split ``test`` never share a scan. A scene is a pure function of ``(options, split, index,
seed)``: nothing is stored, and two processes draw the same one.

Shape suffixes: N scans, C cells, S side of a digit, P side of a cell, H and W of the picture.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator

from foveate import Options

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (235, 50, 50),
    "green": (50, 200, 70),
    "blue": (70, 110, 255),
    "yellow": (240, 220, 50),
    "purple": (190, 70, 230),
    "white": (240, 240, 240),
}
COMPASS = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
BACKGROUND = 16
_TEST_EVERY = 5


class SceneOptions(Options):
    """How scenes look. Every picture has ``rows * cell_px`` by ``columns * cell_px`` pixels."""

    rows: int = Field(3, ge=1, le=9, description="Rows of cells.")
    columns: int = Field(3, ge=2, le=9, description="Columns of cells.")
    cell_px: int = Field(16, ge=8, le=128, description="Side of a cell in pixels.")
    digit_px: int | None = Field(
        None, ge=8, le=128, description="Side of a digit, a thin margin included. Default: the cell's. A smaller digit "
        "stands anywhere in its cell, on steps of its own side."
    )  # fmt: skip
    density: float = Field(0.7, ge=0.0, le=1.0, description="Probability that a cell holds a digit; two always do.")
    noise: int = Field(8, ge=0, le=64, description="Uniform noise: at most this many grey levels up or down.")
    colours: tuple[str, ...] = Field(
        tuple(PALETTE), min_length=1, description="Colours to draw from: red, green, blue, yellow, purple, white."
    )

    @field_validator("digit_px")
    @classmethod
    def _fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > info.data.get("cell_px", value):
            raise ValueError(f"a digit of {value} px does not fit into a cell of {info.data['cell_px']} px")
        return value

    @property
    def side(self) -> int:
        """Side of a digit in pixels, its margin included."""
        return self.digit_px or self.cell_px

    @field_validator("colours")
    @classmethod
    def _known_colours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in PALETTE]
        if unknown:
            raise ValueError(f"unknown colour(s) {', '.join(unknown)}; known are {', '.join(PALETTE)}")
        if len(set(value)) != len(value):
            raise ValueError(f"a colour is named twice in {', '.join(value)}")
        return value


@dataclass(frozen=True, slots=True)
class Cell:
    """One filled cell: its coordinate word `place`, `scan` the row of ``load_digits`` drawn, `top` and
    `left` where in the cell it stands, in pixels."""

    row: int
    column: int
    place: str
    digit: int
    colour: str
    scan: int
    top: int = 0
    left: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """The ground truth of one picture: its filled cells in reading order, and what is needed to draw it."""

    options: SceneOptions
    split: Split
    index: int
    seed: int
    cells: tuple[Cell, ...]

    def at(self, place: str) -> Cell | None:
        """The cell named ``place``, or None where it is empty."""
        return next((cell for cell in self.cells if cell.place == place), None)

    @property
    def places(self) -> tuple[str, ...]:
        """The coordinate words of all cells, filled or not, in reading order."""
        return place_names(self.options.rows, self.options.columns)


@lru_cache
def place_names(rows: int, columns: int) -> tuple[str, ...]:
    """The coordinate words of a grid in reading order: ``northwest`` to ``southeast`` where it is 3 by 3.

    Of other grids two letters: row 0, column 1 is ``ak``. All are words of letters, which tokenizers, unlike ``a2``,
    can make one token.
    """
    if (rows, columns) == (3, 3):
        return COMPASS
    return tuple(f"{row}{column}" for row in "abcdefghi"[:rows] for column in "jklmnopqr"[:columns])


def stream(purpose: str, split: Split, index: int, seed: int) -> np.random.Generator:
    """An independent random stream, keyed by all of its arguments and by nothing else."""
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, index], key=_key(purpose, split, seed)))


def make_scene(options: SceneOptions, split: Split, index: int, seed: int = 0) -> Scene:
    """The ground truth of scene ``index``. Digits are uniform over the ten classes, then over the class's scans."""
    rng = stream("scene", split, index, seed)
    count = options.rows * options.columns
    chances_C = rng.random(count)
    filled_C = (chances_C < options.density) | (chances_C <= np.sort(chances_C)[1])
    digits_C = rng.integers(0, 10, count)
    colours_C = rng.integers(0, len(options.colours), count)
    picks_C = rng.random(count)
    steps_C2 = rng.integers(0, options.cell_px // options.side, (count, 2)) * options.side
    scans, places = _scans_by_class(split), place_names(options.rows, options.columns)
    cells = []
    for position in np.flatnonzero(filled_C).tolist():
        row, column = divmod(position, options.columns)
        digit = int(digits_C[position])
        scan = int(scans[digit][int(picks_C[position] * len(scans[digit]))])
        colour, (top, left) = options.colours[int(colours_C[position])], steps_C2[position].tolist()
        cells.append(Cell(row, column, places[position], digit, colour, scan, top, left))
    return Scene(options, split, index, seed, tuple(cells))


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 ``[H, W, 3]``."""
    options, side = scene.options, scene.options.cell_px
    picture_RPCP3 = np.full((options.rows, side, options.columns, side, 3), BACKGROUND, dtype=np.int16)
    if scene.cells:
        scans_NSS = _enlarged_scans(options.side)
        ink_CSS = scans_NSS[[cell.scan for cell in scene.cells]]
        paint_C3 = np.array([PALETTE[cell.colour] for cell in scene.cells], dtype=np.int32) - BACKGROUND
        digits_CSS3 = (ink_CSS[..., None] * paint_C3[:, None, None, :]) // 255
        inked = scans_NSS.shape[1]
        margin = (options.side - inked) // 2
        for cell, digit_SS3 in zip(scene.cells, digits_CSS3, strict=True):
            top, left = cell.top + margin, cell.left + margin
            picture_RPCP3[cell.row, top : top + inked, cell.column, left : left + inked] += digit_SS3.astype(np.int16)
    picture_HW3 = picture_RPCP3.reshape(options.rows * side, options.columns * side, 3)
    if options.noise:
        rng = stream("noise", scene.split, scene.index, scene.seed)
        picture_HW3 += rng.integers(-options.noise, options.noise, picture_HW3.shape, dtype=np.int8, endpoint=True)
    return np.clip(picture_HW3, 0, 255).astype(np.uint8)


def split_scans(split: Split) -> tuple[int, ...]:
    """The rows of ``load_digits`` that belong to a split: of each class, every fifth scan is for ``test``."""
    return tuple(sorted(scan for scans in _scans_by_class(split) for scan in scans))


@lru_cache
def _key(purpose: str, split: Split, seed: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{purpose}/{split}/{seed}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64)


@lru_cache
def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # slow to import, and needed only where a picture is drawn

    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target.astype(np.int64)


@lru_cache
def _scans_by_class(split: Split) -> tuple[tuple[int, ...], ...]:
    _, labels = _load()
    parts = []
    for digit in range(10):
        scans = np.flatnonzero(labels == digit).tolist()
        parts.append(tuple(s for i, s in enumerate(scans) if (i % _TEST_EVERY == _TEST_EVERY - 1) == (split == "test")))
    return tuple(parts)


@lru_cache
def _enlarged_scans(side_px: int) -> NDArray[np.int32]:
    """All scans enlarged to so many pixels, less a margin of about 1/16: ``[N, S, S]``, 0 to 255."""
    from PIL import Image

    side = side_px - 2 * (side_px // 16)
    images, _ = _load()
    resized = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) for image in images]
    return np.stack(resized).astype(np.int32)
