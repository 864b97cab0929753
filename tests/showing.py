"""Objectives that draw, and small finished runs that used them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveate import LossTerm, ObjectiveContext, ObjectiveOptions, Outputs, Picture, Targets, VisionObjective
from foveate.plugins import Plugins
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.run import Run
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.objectives import ALL, Masked, Noisy, plugins_with


class Drawn(Noisy):
    """Draws its error at every visual token (red), the noise's size (green) and what was edited (blue)."""

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        states = sum(outputs.states(layer) for layer in type(self).reads(self.options).llm)
        noise = outputs.randn_rows(3, name="noise")
        error = (self.head(states) - noise).square().sum(-1)
        values = torch.stack([error.tanh(), noise.square().sum(-1).tanh(), outputs.edited.to(error)], -1)
        pictures = []
        for image, rows in zip(outputs.images, outputs.split(values), strict=True):
            whole = torch.cat([rows.new_zeros(image.dropped, 3), rows]).reshape(*image.record.grid, 3)
            array = (255 * whole).round().byte().cpu().numpy()
            pictures.append(Picture(f"error of {image.record.sample_id}", Image.fromarray(array)))
        return pictures


class DrawnMask(Masked):
    """Draws which tokens it has replaced."""

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        parts = outputs.split(outputs.edited.byte() * 255)
        grids = [image.record.grid for image in outputs.images]
        arrays = [part.reshape(grid).cpu().numpy() for part, grid in zip(parts, grids, strict=True)]
        return [Picture("edited", Image.fromarray(array)) for array in arrays]


class Sketch(VisionObjective):
    """For `target` images, which the model does not see; draws their pixels."""

    role = "target"

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.shade = torch.nn.Parameter(torch.zeros(()))

    @classmethod
    def count(cls, options: ObjectiveOptions, record: Any) -> float:
        return 1

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        assert outputs.pixels is not None
        return LossTerm((outputs.pixels.mean((1, 2, 3)) - self.shade).square().sum())

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        assert outputs.pixels is not None
        arrays = ((outputs.pixels * 0.5 + 0.5) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        names = [image.record.sample_id for image in outputs.images]
        return [Picture(f"target {name}", Image.fromarray(array)) for name, array in zip(names, arrays, strict=True)]


class Failing(Noisy):
    """Cannot draw."""

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        raise ValueError("no colours left <b>")


DRAWING: dict[str, type] = {**ALL, "drawn": Drawn, "drawn_mask": DrawnMask, "sketch": Sketch, "failing": Failing}
RATES = {"encoder": 1e-3, "projector": 1e-3, "llm": 1e-3}


def plugins() -> Plugins:
    """What is installed, and the objectives above."""
    return plugins_with(DRAWING)


def finished_run(
    folder: Path, corpus: Path, objectives: Mapping[str, Any], stages: list[dict[str, Any]], *,
    display: Display | None = None, **top: Any,
) -> Run:  # fmt: skip
    """Train `stages`, each laid over the corpus's own; the run is `folder/run`."""
    folder.mkdir(exist_ok=True, parents=True)
    plain = {**recipe_dict(corpus)["stages"][0], "max_steps": 2}
    made = [{**plain, "train": {**RATES, **dict.fromkeys(objectives, 1e-2)}, **stage} for stage in stages]
    recipe = recipe_dict(corpus, output=str(folder / "run"), objectives=dict(objectives), stages=made, **top)
    loaded = load_recipe(write_recipe(folder, recipe), plugins=plugins())
    return train(loaded, display=display or Display(quiet=True))


def array(picture: Picture) -> np.ndarray:
    """The values of a picture, as numbers that can be subtracted."""
    return np.asarray(picture.image).astype(int)
