"""Tiny tokenizers and heads for the tests of ASVR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.testing.models import Bench, choose, tiny_lmm
from tests.corpus import recipe_dict, write_recipe

FIT = {"images": 60, "check": 8, "reservoir": 4}
TOKENIZER: dict[str, Any] = {"depth": 3, "codebook_size": 8, "fit": FIT}
APPEARANCE: dict[str, Any] = {
    **TOKENIZER, "decoder": {"width": 8, "blocks": 1, "patch_px": 4}, "fit": {**FIT, "batch_images": 8},
}  # fmt: skip
HEAD: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2}
OPTIONS: dict[str, Any] = {"tokenizer": TOKENIZER, "appearance": APPEARANCE, "head": HEAD}
TRAIN = {"projector": 1e-3, "llm": 1e-3}
"""The encoder is frozen: its features are what the codes are of."""


def bench(**options: Any) -> Bench:
    """The objective on the tiny model of the conformance kit, in float64, its tokenizer fitted."""
    return Bench(choose("asvr", {**OPTIONS, **options}), tiny_lmm())


def write(folder: Path, corpus: Path, objectives: dict[str, Any], **changes: Any) -> Path:
    """A recipe of one stage with objectives; `changes` go to the stage, or to the top level where it has the key."""
    folder.mkdir(exist_ok=True)
    top = {key: changes.pop(key) for key in ("precision", "hardware", "model", "seed") if key in changes}
    train = {**TRAIN, **dict.fromkeys(objectives, 1e-2)}
    stage = {**recipe_dict(corpus)["stages"][0], "train": train, **changes}
    content = recipe_dict(corpus, output=str(folder / "run"), objectives=objectives, stages=[stage], **top)
    return write_recipe(folder, content)
