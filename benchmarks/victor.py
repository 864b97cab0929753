"""ViCToR's matching: ours beside the released code's way, and beside one scipy call after another on the same costs.

    python benchmarks/victor.py                                     # all sizes; minutes
    python benchmarks/victor.py --pool 2048 --width 896 --images 4 --repeat 1 --no-step

An image has 547 of 729 tokens to match. Sides that take turns, all on one process's cores:

- `released`: for each image `torch.cdist`, then scipy, with a pool of N(0, 1): √D times longer than the tokens.
- `ours`: costs of all images in one product, images in parallel threads, a pool of the tokens' own scale.
- `scipy`: one call after another on the very costs of `ours`.

Tokens are of unit norm around a common mean; `parallel`: those of an image differ by a twentieth of that only, so that
all want the same rows. The share of a whole step is that of the model of examples/digits.yaml, trained for some steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "plugins"))

from foveate_victor.matching import match, pairwise_costs  # noqa: E402

TOKENS = 547


def tokens_of(images: int, width: int, spread: float, common: Tensor, random: torch.Generator) -> list[Tensor]:
    """Unit tokens `[TOKENS, width]` of each image, around a mean that each image has of its own."""
    means = common + torch.randn(images, width, generator=random)
    return [F.normalize(mean + spread * torch.randn(TOKENS, width, generator=random), dim=-1) for mean in means]


def released(tokens: list[Tensor], pool: Tensor) -> None:
    for image in tokens:
        linear_sum_assignment(torch.cdist(image, pool).numpy())


def ours(tokens: list[Tensor], pool: Tensor) -> None:
    match(pairwise_costs(torch.cat(tokens), pool, "euclidean"), [len(image) for image in tokens])


def one_after_another(costs: list[np.ndarray]) -> None:
    for array in costs:
        linear_sum_assignment(array)


def in_turns(repeat: int, **sides: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each side, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(pool_size: int, width: int, images: int, repeat: int) -> None:
    random = torch.Generator().manual_seed(pool_size + width)
    common = torch.randn(width, generator=random)
    others = torch.cat(tokens_of(1 + pool_size // TOKENS * 4, width, 1.0, common, random))
    pool = others[torch.randperm(len(others), generator=random)[:pool_size]]  # `pool_init: features`
    gaussian = torch.randn(pool_size, width, generator=random)
    for kind, spread in (("tokens", 1.0), ("parallel", 0.05)):
        tokens = tokens_of(images, width, spread, common, random)
        costs = pairwise_costs(torch.cat(tokens), pool, "euclidean")
        sizes = [TOKENS] * images
        arrays = [part.numpy() for part in costs.split(sizes)]
        best = sum(array[linear_sum_assignment(array)].sum(dtype=float) for array in arrays)
        found = float(match(costs, sizes).costs.double().sum())
        assert abs(found - best) <= 1e-6 * best, "not the optimum"
        whole = in_turns(repeat, released=partial(released, tokens, gaussian), ours=partial(ours, tokens, pool))
        same = in_turns(repeat, scipy=partial(one_after_another, arrays), ours=partial(match, costs, sizes))
        told = [f"{TOKENS} x {pool_size:5d}, width {width:4d}, {kind:8s}", *compared(whole, images)]
        told += ["| same costs:", *compared(same, images)]
        print(*told, f"| step of {images}: {statistics.median(whole['ours']):.2f} s", flush=True)


def compared(seconds: dict[str, list[float]], images: int) -> list[str]:
    """Milliseconds an image of two sides, and how much faster the second is, median over turns."""
    (slow, before), (fast, after) = seconds.items()
    shown = [
        f"{name} {1e3 * statistics.median(times) / images:6.1f} ms" for name, times in ((slow, before), (fast, after))
    ]
    return [*shown, f"{statistics.median(a / b for a, b in zip(before, after, strict=True)):5.2f} x"]


def share_of_a_step(steps: int, threads: int) -> None:
    """Matching ÷ step, of the model of examples/digits.yaml with a pool of 256."""
    from foveate import load_recipe, train
    from foveate.progress import Display

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "victor.yaml"
        base = ROOT / "examples" / "digits.yaml"
        recipe.write_text(f"extends: {base}\nobjectives:\n  victor: {{pool_size: 256}}\n")
        rates = "{encoder: 1.5e-3, projector: 1.5e-3, llm: 1.5e-3, victor: 1.5e-3}"
        changes = [
            f"output={folder}/run", "evaluate=null", f"hardware.threads={threads}", "model.projector.normalize=true",
            "stages.0.epochs=null", f"stages.0.max_steps={steps}", f"stages.0.train={rates}",
            "stages.1.epochs=null", "stages.1.max_steps=1", "stages.1.objectives=[]",
        ]  # fmt: skip
        lines = train(load_recipe(recipe, changes), display=Display(quiet=True)).metrics()[steps // 10 : steps]
    shares = [line["victor/matching_seconds"] * line["images"] / line["step_seconds"] for line in lines]
    step, used = statistics.median(line["step_seconds"] for line in lines), lines[-1]["victor/used_rows"]
    told = f"matching is {100 * statistics.median(shares):.1f} % of a step of {1e3 * step:.0f} ms"
    print(f"digits.yaml, 16 images of 36 tokens, pool of 256: {told}; used rows {used:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--width", type=int, nargs="+", default=[896, 3584])
    parser.add_argument("--images", type=int, default=16, help="of a step")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch; the solver takes the process's cores")
    parser.add_argument("--steps", type=int, default=60, help="of the training that gives the share of a step")
    parser.add_argument("--no-step", action="store_true", help="without the share of a step")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for pool_size in given.pool:
        for width in given.width:
            compare(pool_size, width, given.images, given.repeat)
    if not given.no_step:
        share_of_a_step(given.steps, given.threads)


if __name__ == "__main__":
    main()
