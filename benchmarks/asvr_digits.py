"""What ASVR learns on the digits: how often codes of held-out scenes are predicted, beside guesses that see nothing.

    foveate train examples/asvr_digits.yaml
    foveate train examples/asvr_digits.yaml --set name=shift-0 --set objectives.asvr.shift=0
    python benchmarks/asvr_digits.py runs/asvr_digits runs/shift-0 [--images 512]

For each run, target and depth, on scenes whose scans no training scene shows:

- `top-1`: the likeliest code is the right one, given the right codes of the depths before it;
- `guess`: the most frequent code of that depth, always;
- `guess by place`: the most frequent code of that depth at that place of the grid, always.

Both guesses know the held-out codes' own frequencies, so they are as good as such guesses can be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import load_run
from foveate.loaded import LoadedRun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--objective", default="asvr")
    parser.add_argument("--images", type=int, default=512, help="held-out scenes")
    given = parser.parse_args()
    for folder in given.runs:
        found = {}
        for target, (right, codes) in predicted(load_run(folder), given.objective, given.images).items():
            found[target] = by_depth(right, codes)
        print(json.dumps({str(folder): found}, indent=1), flush=True)


@torch.no_grad()
def predicted(run: LoadedRun, name: str, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Target → which codes are predicted `[images, rows, Q]` bool, and the codes of the same rows.

    Rows whose state is not read (the first of an image that opens its sample, with `shift: 1`) are left out.
    """
    objective: Any = run.learner.objectives[name]
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for _, seen in run.gallery.seen(name):
        outputs, targets = seen.outputs, seen.targets
        for target, head in objective.heads.items():
            states, codes = outputs.states(), targets.rows(target)
            logits = head.each_depth(states, codes, outputs.teacher[target].quantizer)
            right = torch.stack([each.argmax(1) for each in logits], 1) == codes
            parts.setdefault(target, []).extend(zip(outputs.split(right), outputs.split(codes), strict=True))
        if all(len(found) >= count for found in parts.values()):
            break
    columns = {target: zip(*found[:count], strict=True) for target, found in parts.items()}
    return {target: tuple(torch.stack(column) for column in both) for target, both in columns.items()}  # type: ignore[misc]


def by_depth(right: Tensor, codes: Tensor) -> dict[str, list[float]]:
    """The shares that the module's docstring tells, a number a depth."""
    return {
        "top-1": right.double().mean((0, 1)).tolist(),
        "guess": [most_frequent(depth.flatten()[:, None]) for depth in codes.unbind(2)],
        "guess by place": [most_frequent(depth) for depth in codes.unbind(2)],
    }


def most_frequent(codes: Tensor) -> float:
    """Codes `[M, places]` → how often the most frequent code of each place is the right one."""
    return sum(float(column.bincount().max()) for column in codes.unbind(1)) / codes.numel()


if __name__ == "__main__":
    main()
