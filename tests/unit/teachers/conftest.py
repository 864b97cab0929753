"""Shared by the tests of teachers: a real photograph, image records, and models that they are built for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from foveate.objective import ObjectiveContext, Teacher, TeacherInputs
from foveate.options import Options
from foveate.types import EncoderSpec, Grid, ImageRecord

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two photographs, of different sizes."""
    china, flower = (Image.fromarray(array) for array in load_sample_images().images)
    return [china.resize((160, 107)), flower.crop((100, 20, 500, 420)).resize((120, 120))]


def context(grid: Grid, encoder: EncoderSpec | None = None) -> ObjectiveContext:
    """A model with so many visual tokens an image."""
    return ObjectiveContext("some", 32, 2, grid, encoder or EncoderSpec(12, (3, 3), 24, HALF, HALF))


def records(count: int, grid: Grid) -> list[ImageRecord]:
    """So many images."""
    return [ImageRecord(f"s{number}", 0, "input", grid, 1) for number in range(count)]


def built(cls: type[Teacher], options: Options, where: ObjectiveContext, seed: int = 0) -> Any:
    """A teacher as core has it: seeded, in eval, frozen."""
    torch.manual_seed(seed)
    return cls(options, where).eval().requires_grad_(False)


def inputs(cls: type[Teacher], options: Options, pictures: Sequence[Image.Image], grid: Grid) -> TeacherInputs:
    """What the loader hands to a teacher."""
    rows = records(len(pictures), grid)
    prepared = [cls.prepare_image(options, picture, row) for picture, row in zip(pictures, rows, strict=True)]
    return TeacherInputs(rows, prepared)


def pixels_of(picture: Image.Image, height: int, width: int) -> torch.Tensor:
    """The picture at a size, `[3, H, W]` in 0…255, float64, pixel by pixel."""
    values = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    return torch.tensor(values).movedim(-1, 0)
