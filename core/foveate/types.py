"""The words of the data path: what a conversation, an image, a sample and a packed batch are.

Shape legend, used in the whole project: T tokens of a packed row, L tokens of one sample, S supervised
positions, V visual tokens of a row, I images of a row, N = h*w visual tokens of one image, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not supervised."""

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a conversation's text where one of its images goes."""

Grid = tuple[int, int]
"""Rows and columns of a grid of patches or visual tokens."""

ImageRole = Literal["input", "target"]
"""`input`: the model sees the image. `target`: only objectives see it."""

Geometry = Literal["pad", "resize", "crop"]
"""How a picture becomes the encoder's square: padded, squashed, or cut at its centre."""


@dataclass(frozen=True)
class ImageRef:
    """Where a picture comes from: a file, encoded bytes, a PIL image, or a function that makes one (lazily)."""

    source: Path | bytes | Image.Image | Callable[[], Image.Image]
    role: ImageRole = "input"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `text` may hold `<image>` placeholders (also in an assistant's turn)."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """A row of a data set: turns, its `input` images in the order of their placeholders, then any `target` images.

    A conversation without turns and with images is an image-only sample. `meta` travels to metrics
    (a question's kind, for instance) and is never shown to the model.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is, known from its options alone (no weights): enough to make pixels and count tokens.

    `image_size` is the side of the square input in pixels; `grid` the rows and columns of the features that it
    returns; `width` their channels; `mean`/`std` per colour channel for values in 0…1; `resample` a PIL filter number;
    `image_processor` the class name in transformers that an export of the model names.
    """

    image_size: int
    grid: Grid
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC
    image_processor: str = "CLIPImageProcessor"


@dataclass(frozen=True)
class ImageRecord:
    """One image of a sample, as every objective sees it.

    `start` is its first visual token's position: in the sample while a `Sample`, in the packed row once in a
    `Batch`; -1 for a `target` image. `grid` is the grid of visual tokens. `content` is the box of the area under the
    grid that is not padding, as fractions (left, top, right, bottom) of its sides. `opens`: nothing stands before its
    visual tokens in the sample. `occurrence` tells apart a sample's appearances in one step. `objectives`: names of the
    active objectives that it is for. `extra`: objective → (position, number) of its extra tokens, counted like `start`.
    `dummy`: a stand-in where a row lacks an image; whatever is computed of it counts zero.
    """

    sample_id: str
    index: int
    role: ImageRole
    grid: Grid
    start: int
    content: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    opens: bool = False
    occurrence: int = 0
    objectives: tuple[str, ...] = ()
    extra: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    dummy: bool = False

    @property
    def tokens(self) -> int:
        """Visual tokens of the image in the LLM's input: h*w, or 0 for a `target` image."""
        return self.grid[0] * self.grid[1] if self.role == "input" else 0

    def rows(self, shift: int = 0) -> int:
        """Visual tokens that have a state: all, but the first where the image opens its sample and `shift` is 1."""
        return self.tokens - bool(self.tokens and shift and self.opens)

    def valid(self) -> Tensor:
        """`[h*w]` bool on the CPU: visual tokens whose centre does not lie in padding, known once it is opened."""
        (rows, columns), (left, top, right, bottom) = self.grid, self.content
        y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
        return ((top <= y) & (y <= bottom))[:, None].logical_and((left <= x) & (x <= right)).flatten()


@dataclass
class Sample:
    """A tokenized conversation, each image already as many placeholder tokens as it will have visual tokens.

    `input_ids` and `labels` are `[L]` int64 tensors on the CPU; `labels[i]` is the token at `i` itself where it is
    supervised and `IGNORE_INDEX` elsewhere (the shift by one happens when packing). `pixels` holds one `[3, H, W]`
    tensor an image and `views` what teachers want of it, both empty until the pictures are opened.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    images: list[ImageRecord]
    refs: tuple[ImageRef, ...] = ()
    pixels: list[Tensor] = field(default_factory=list)
    views: list[Mapping[str, Mapping[str, Tensor]]] = field(default_factory=list)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """L, visual tokens included."""
        return int(self.input_ids.numel())

    @property
    def supervised(self) -> int:
        """How many next-token predictions of the sample are supervised (its first token never is)."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass
class Batch:
    """One packed micro-batch: samples end to end in one row, without padding.

    - `input_ids` `[T]`; at visual positions any valid token id (its embedding is replaced).
    - `position_ids` `[T]`: restart at 0 with each sample.
    - `lengths`: tokens of each sample, in row order; they sum to T. Attention never crosses them.
    - `target_positions` `[S]`: positions whose *next* token is supervised; `target_ids` `[S]`: that token.
    - `pixels` `[I, 3, H, W]`: every image of the row, `input` and `target`, in the order of `images`.
    - `visual_positions` `[V]`: positions of the `input` images' visual tokens, image after image.
    - `images`: one record an image, `start` counted in the row.
    - `sample_ids`, `metas`: one entry a sample. `sample_targets` `[S]`: which sample a target belongs to.
    - `prompts`: tokens of each sample before its first supervised one.
    - `rows`: objective → where its images lie. `views`: one mapping an image, what teachers want of it.
    - `dummy`: the row stands in for a rank that has nothing left; it counts zero.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    target_positions: Tensor
    target_ids: Tensor
    sample_targets: Tensor
    pixels: Tensor
    visual_positions: Tensor
    images: list[ImageRecord]
    sample_ids: list[str]
    metas: list[Mapping[str, Any]]
    prompts: tuple[int, ...] = ()
    rows: Mapping[str, Any] = field(default_factory=dict)
    views: list[Mapping[str, Mapping[str, Tensor]]] = field(default_factory=list)
    dummy: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, so that its transfer overlaps with compute."""
        return _each_tensor(self, Tensor.pin_memory)


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of data classes, mappings and lists, each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_tensor(item, change) for item in value]
    if is_dataclass(value) and not isinstance(value, type | ImageRecord):
        return replace(value, **{item.name: _each_tensor(getattr(value, item.name), change) for item in fields(value)})
    return value
