"""Fitting a recipe's tokenizers by themselves, and writing them as folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from foveate import assemble
from foveate.errors import UserError
from foveate.fitting import pictures
from foveate_asvr.objective import Asvr, Tokenizers


def fit(recipe: Any, name: str, out: Path) -> Iterator[tuple[Path, str, dict[str, float]]]:
    """Fits the tokenizers of objective `name` to the pictures of its first stage; all parts in full precision.

    Yields folder, kind, and what the fit told. Raises `UserError` where nothing is to be fitted.
    """
    options: Any = recipe.objectives[name].options
    chosen = options.tokenizers()
    if not Asvr.needs_fit(options):
        raise UserError(f"objective '{name}' has nothing to fit: its tokenizers are `pretrained`")
    device = torch.accelerator.current_accelerator(check_available=True)
    made = assemble(recipe, device if device is not None else "cpu")
    made.lmm.eval().requires_grad_(False)
    teachers = made.learner.teachers
    teacher = teachers.of(name)
    assert isinstance(teacher, Tokenizers)
    told = teachers.fit(name, lambda: pictures(made, name)) or {}
    for target, (kind, _) in chosen.items():
        if not kind.needs_fit(chosen[target][1]):
            continue
        folder, start = (out / target, f"{target}/") if len(chosen) > 1 else (out, "")
        numbers = {key.removeprefix(start): value for key, value in told.items() if key.startswith(start)}
        tokenizer: Any = teacher[target]
        tokenizer.save(folder, made.lmm.encoder, numbers)
        yield folder, kind.kind, numbers
