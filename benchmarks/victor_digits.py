"""What ViCToR learns on the digits: are replaced visual tokens reconstructed, and by help of the pool?

    python benchmarks/victor_digits.py [--folder DIR] [--set KEY=VALUE …]

Trains the first two stages of `examples/victor_digits.yaml`: `align` once, then `comprehend` from there, as long
each time: as it stands; with a pool that stays what it started from, visual tokens or random directions; and with the
released code's start of the pool. Runs that are in DIR already are taken as they are. On held-out scenes, which share
no scan with training, after `comprehend`:

- the loss, and that of predicting zero, above which nothing has been learned;
- the cosine on replaced tokens: of the model; of the image's mean token, and of the mean token of all scenes; of the
  same model and head with random directions in place of the pool;
- the same on tokens that show a digit: most show background, which any mean predicts well;
- the variance of an image's targets (1: they cancel out, 0: they are all the same), and the used rows of the pool.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import load_recipe, load_run, train
from foveate.loaded import LoadedRun
from foveate.progress import Display
from foveate_lab.digits import DigitsDataset

RECIPE = Path(__file__).parents[1] / "examples" / "victor_digits.yaml"
ALIGN = ["stages.comprehend=false", "stages.instruct=false", "objectives.victor=false", "evaluate=null"]
COMPREHEND = ["stages.align=false", "stages.instruct=false", "evaluate.data.0.size=16"]  # its questions come later
FROZEN = "stages.comprehend.train={encoder: 15e-4, projector: 15e-4, llm: 15e-4, victor.head: 15e-4}"
VARIANTS = {
    "default": [],
    "pool not trained": [FROZEN],
    "random pool, not trained": [FROZEN, "objectives.victor.pool_init=unit_gaussian"],
    "released start": ["objectives.victor.pool_init=gaussian", "objectives.victor.pool_norm=free"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the runs; those that are there are not trained again")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="in all runs")
    parser.add_argument("--images", type=int, default=512, help="held-out scenes, at most 2000")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="victor_digits"))
    aligned = trained(folder / "align", [*given.changes, *ALIGN])
    start = f"model={{from: {aligned.resolve() / 'model'}}}"
    found = {}
    for name, changes in VARIANTS.items():
        run = trained(folder / name.replace(",", "").replace(" ", "-"), [*given.changes, *COMPREHEND, *changes, start])
        found[name] = measured(load_run(run, changes=[f"evaluate.data.0.size={given.images}"]), given.images)
        print(f"{name}: {found[name]['cosine on replaced tokens']}", flush=True)
    print(json.dumps(found, indent=2, ensure_ascii=False))


def trained(folder: Path, changes: list[str]) -> Path:
    """The run in `folder`, trained where it is not there."""
    if not (folder / "model").is_dir():
        train(load_recipe(RECIPE, [*changes, f"output={folder}"]), display=Display(200))
    return folder


def measured(run: LoadedRun, count: int) -> dict[str, Any]:
    """What stands in the JSON, of `count` held-out scenes."""
    learned: Any = run.learner.objectives["victor"]
    options, pool = learned.options, learned.pool.rows
    made, wanted, replaced, digits = reconstructed(run, count)
    zero = options.scale * smooth_l1(torch.zeros_like(wanted), wanted, options.beta)
    means = {"the image's mean token": wanted.mean(1, keepdim=True), "the mean token": wanted.mean((0, 1))}
    sides = {"model": made, **{name: mean.expand_as(wanted) for name, mean in means.items()}}
    norm = 1.0 if options.pool_norm == "unit" else float(pool.norm(dim=-1).mean())
    directions = F.normalize(torch.randn(pool.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    pool.data.copy_(directions * norm)
    sides["random directions for the pool"] = reconstructed(run, count)[0]
    cosines = {name: F.cosine_similarity(side, wanted, dim=-1) for name, side in sides.items()}
    lines = run.metrics()
    return {
        "loss": float(options.scale * smooth_l1(made, wanted, options.beta)),
        "loss on replaced tokens": float(options.scale * smooth_l1(made[replaced], wanted[replaced], options.beta)),
        "loss of predicting zero": float(zero),
        "cosine on replaced tokens": {name: float(side[replaced].mean()) for name, side in cosines.items()},
        "… that show a digit": {name: float(side[replaced & digits].mean()) for name, side in cosines.items()},
        "cosine on kept tokens": float(cosines["model"][~replaced].mean()),
        "variance of an image's targets": float((1 - wanted.mean(1).square().sum(-1)).mean()),
        "used rows of the pool": lines[-1]["victor/used_rows"],
        "text loss of the last steps": sum(line["loss/text"] for line in lines[-20:]) / 20,
    }


def smooth_l1(made: Tensor, wanted: Tensor, beta: float) -> Tensor:
    return F.smooth_l1_loss(made, wanted, beta=beta)


@torch.no_grad()
def reconstructed(run: LoadedRun, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions and targets `[images, tokens, D]`; which tokens are replaced, and which show a digit."""
    objective: Any = run.learner.objectives["victor"]
    parts: list[tuple[Tensor, ...]] = []
    options: Any = run.recipe.evaluate.data[0].dataset.options if run.recipe.evaluate else None
    scenes = DigitsDataset(options)
    for _, seen in run.gallery.seen("victor"):
        outputs = seen.outputs
        made, wanted = objective.head(outputs.states()), F.normalize(outputs.visual_tokens, dim=-1)
        replaced = torch.zeros(len(wanted), dtype=torch.bool).index_fill(0, seen.state.where, True)
        for image, *rows in zip(outputs.images, *map(outputs.split, (made, wanted, replaced)), strict=True):
            number = int(image.record.sample_id.split("-")[-1])
            parts.append((*rows, shows_digit(scenes, number, image.record.grid)))
        if len(parts) >= count:
            break
    made, wanted, replaced, digits = (torch.stack(column) for column in zip(*parts[:count], strict=True))
    return made, wanted, replaced, digits


def shows_digit(scenes: DigitsDataset, number: int, grid: tuple[int, int]) -> Tensor:
    """`[tokens]`: whether a patch of the grid lies in a digit's square."""
    options, shown = scenes.options, torch.zeros(grid, dtype=torch.bool)
    side = options.rows * options.cell_px // grid[0]
    for cell in scenes.scene(number).cells:
        top, left = cell.row * options.cell_px + cell.top, cell.column * options.cell_px + cell.left
        shown[top // side : (top + options.side) // side, left // side : (left + options.side) // side] = True
    return shown.flatten()


if __name__ == "__main__":
    main()
