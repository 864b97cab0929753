"""What ROSS learns on the digits: from the model's states, or from the noisy input alone?

    python benchmarks/ross_digits.py [RUN] [--set KEY=VALUE …]

Trains `examples/ross_digits.yaml` (or takes a finished RUN of it), and the control: the same recipe, as long, whose
denoiser gets the states of another image of its micro-batch. On held-out scenes, which share no scan with training:

- the loss with an image's own states, with another's (same noise, same timesteps), and the control's;
- PSNR of the sampled reconstruction, of the teacher's own, and of the mean training picture;
- digits that a plain classifier, trained on training scenes, reads in the cells of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC

import foveate
from foveate import load_recipe, load_run, train
from foveate.loaded import LoadedRun
from foveate.plugins import load_plugins
from foveate.progress import Display
from foveate_lab.digits import DigitsDataset
from foveate_ross.conditions import swapped_conditions
from foveate_ross.objective import Ross

RECIPE = Path(__file__).parents[1] / "examples" / "ross_digits.yaml"


class Control(Ross):
    """ROSS whose conditions are those of the next image of the micro-batch."""

    def conditions(self, outputs: Any) -> torch.Tensor:
        own = outputs.split(super().conditions(outputs))
        return torch.cat([*own[1:], own[0]])


class ControlPlugin:
    """Registers the control."""

    HOOK_API = foveate.HOOK_API

    @foveate.hookimpl
    def register_objectives(self, register: Any) -> None:
        register("ross_control", Control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished run of examples/ross_digits.yaml")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--no-control", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ross_digits"))
    run = given.run or train(load_recipe(RECIPE, [*given.changes, f"output={folder}/own"])).folder
    found: dict[str, Any] = {"run": str(run), **measured(load_run(run), given.images)}
    if not given.no_control:
        plugins = load_plugins()
        plugins.add(ControlPlugin(), "benchmark (control)")
        teacher = f"{{type: autoencoder_kl, pretrained: {run.resolve()}/teachers/ross, patch: 4}}"  # fitted once
        own = ["objectives.ross.type=ross_control", f"objectives.ross.teacher={teacher}", f"output={folder}/control"]
        control = train(load_recipe(RECIPE, [*given.changes, *own], plugins=plugins), display=Display(200)).folder
        summary = swapped_conditions(load_run(control, plugins=plugins), "ross", given.images).summary()
        found["loss"]["control, trained as long"] = summary["own"]
    print(json.dumps(found, indent=2))


def measured(run: LoadedRun, count: int) -> dict[str, Any]:
    """Losses, PSNR and readings of `count` held-out scenes."""
    gap = swapped_conditions(run, "ross", count).summary()
    options: Any = run.recipe.evaluate.data[0].dataset.options if run.recipe.evaluate else None
    scenes, pictures = DigitsDataset(options), {"original": np.stack([drawn(options, at) for at in range(count)])}
    pictures["teacher"], pictures["model"] = reconstructed(run, count)
    before = options.model_copy(update={"split": "train"})
    seen = np.stack([drawn(before, at) for at in range(1000)])
    pictures["mean picture"] = np.broadcast_to(seen.mean(0).round().astype(np.uint8), pictures["original"].shape)
    classifier = SVC().fit(*cells(DigitsDataset(before), seen))
    return {
        "loss": gap,
        "psnr": {name: psnr(made, pictures["original"]) for name, made in pictures.items() if name != "original"},
        "digits read": {name: read(classifier, scenes, made) for name, made in pictures.items()} | {"chance": 0.1},
    }


def drawn(options: Any, index: int) -> NDArray[np.uint8]:
    """A scene of the data set."""
    source: Any = DigitsDataset(options)[index].images[0].source
    return np.asarray(source())


def reconstructed(run: LoadedRun, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What the teacher, and what the model, makes of the first held-out scenes, `[I, H, W, 3]`."""
    made: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    objective: Any = run.learner.objectives["ross"]
    for _, seen in run.gallery.seen("ross"):
        names = [image.record.sample_id for image in seen.outputs.images]
        scenes = [int(name.rpartition("-")[2]) for name in names]  # a packed row has the longest sample first
        with torch.no_grad():
            for group in objective.groups(seen.outputs, seen.targets):
                rows = objective.head.reconstruct(group)
                for kept, target in zip(made, (group.target, rows.to(group.target)), strict=True):
                    pixels = (group.outputs.teacher.decode(target) * 255).round().byte().permute(0, 2, 3, 1).numpy()
                    kept.update(zip((scenes[number] for number in group.numbers), pixels, strict=True))
        if all(number in made[0] for number in range(count)):
            break
    teacher, model = (np.stack([kept[number] for number in range(count)]) for kept in made)
    return teacher, model


def psnr(drawn: NDArray[np.uint8], originals: NDArray[np.uint8]) -> float:
    """Mean over pictures, in decibels."""
    errors = ((drawn.astype(float) - originals) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def cells(data: DigitsDataset, pictures: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The inkiest quarter of each filled cell, grey, `[cells, 16*16]`, and the digit that stands in the cell."""
    found, digits = [], []
    for number, picture in enumerate(pictures):
        grey, side = picture.max(-1).astype(float) / 255, data.options.cell_px
        for cell in data.scene(number).cells:
            square = grey[cell.row * side :, cell.column * side :][:side, :side]
            quarters = square.reshape(2, side // 2, 2, side // 2).transpose(0, 2, 1, 3).reshape(4, -1)
            found.append(quarters[quarters.sum(1).argmax()])
            digits.append(cell.digit)
    return np.stack(found), np.array(digits)


def read(classifier: SVC, data: DigitsDataset, pictures: NDArray[np.uint8]) -> float:
    """Share of the digits in filled cells that the classifier reads right."""
    inputs, digits = cells(data, pictures)
    return float((classifier.predict(inputs) == digits).mean())


if __name__ == "__main__":
    main()
