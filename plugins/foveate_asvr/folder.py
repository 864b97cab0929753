"""A tokenizer's folder: `tokenizer.json` (what it is), `codebooks.safetensors`, and the weights of its own encoder.

Whose features the codes are of is never left to chance: a folder either holds its encoder, or the digests of the
weights that the model's own encoder must have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate import Encoder, EncoderSpec, Grid, Layer
from foveate.errors import ModelError, RunError
from foveate.files import atomic_folder, write_json
from foveate.model.build import load_strictly
from foveate.model.taps import END, layer_index
from foveate.objective import ObjectiveContext
from foveate.registry import Component, resolve

CARD, CODEBOOKS, ENCODER = "tokenizer.json", "codebooks.safetensors", "encoder.safetensors"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Card:
    """What a tokenizer is, without weights.

    `grid`: of the rows that it was fitted to. `layer`: of the model's encoder, where its pass is read. `encoder`: type
    and options of its own; None: it was fitted to the model's. `spec`: of the encoder whose features it quantises.
    `digests`: of that encoder's weights up to the layer, by dtype. `options`: more about its kind. `told`: by the fit.
    """

    kind: str
    depth: int
    codebook_size: int
    width: int
    shared: bool
    grid: Grid
    layer: Layer
    spec: EncoderSpec
    digests: Mapping[str, str]
    encoder: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)

    def component(self) -> Component | None:
        """Its own encoder's class and options."""
        return None if self.encoder is None else resolve("encoders", dict(self.encoder), None)


def write_folder(folder: Path, card: Card, weights: Mapping[str, Tensor], encoder: nn.Module | None) -> None:
    """Writes a tokenizer, whole or not at all. Raises `RunError` where the folder exists or cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is not an empty folder: choose another, or remove it first.")
    with atomic_folder(folder) as aside:
        save_file(_plain(weights), aside / CODEBOOKS)
        if encoder is not None:
            save_file(_plain(encoder.state_dict()), aside / ENCODER)
        write_json(aside / CARD, {"format": 1, **asdict(card)})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def read_card(folder: Path, kind: str) -> Card:
    """The card of a tokenizer of a kind. Raises `ModelError` where the folder is none, or lacks a file."""
    card = _read_card(folder)
    if card.kind != kind:
        raise ModelError(f"{folder} is a tokenizer of kind '{card.kind}', and '{kind}' is needed here")
    return card


@lru_cache(maxsize=16)
def _read_card(folder: Path) -> Card:
    hint = "`foveate asvr fit-tokenizer` and `foveate import tokenizer` write such folders"
    if not (folder / CARD).is_file():
        raise ModelError(f"{folder} is no tokenizer: it has no {CARD}; {hint}")
    try:
        fields = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if fields.pop("format") != 1:
            raise ValueError("it is of a format that this version does not know")
        spec = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.pop("spec").items()}
        fields["grid"] = tuple(fields["grid"])
        card = Card(spec=EncoderSpec(**spec), **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / CARD} cannot be read: {error!r}; {hint}") from error
    for name in (CODEBOOKS, *((ENCODER,) if card.encoder is not None else ())):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing: the tokenizer is not complete; {hint}")
    return card


def load_weights(folder: Path, name: str, module: nn.Module, but: str = "") -> None:
    """Loads a file of a tokenizer's folder into a module, strictly, leaving out its part `but`.

    Raises `ModelError` for whatever does not fit.
    """
    try:
        state = load_file(folder / name)
    except Exception as error:  # safetensors raises errors of its own
        raise ModelError(f"{folder / name} cannot be read: {error}") from error
    if broken := [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ModelError(f"{folder / name} holds values that are not finite: {', '.join(broken[:4])}")
    parts = tuple(key for key in module.state_dict() if not but or not key.startswith(f"{but}."))
    load_strictly(module, state, parts, str(folder / name))


def check_model(card: Card, context: ObjectiveContext, folder: Path) -> None:
    """Raises `ModelError` where the model's encoder cannot be the one whose features a tokenizer quantises."""
    mine, other = card.spec, context.encoder
    facts = {
        "width": (mine.width, other.width), "grid": (mine.grid, other.grid),
        "image size": (mine.image_size, other.image_size), "pixel mean": (mine.mean, other.mean),
        "pixel deviation": (mine.std, other.std),
    }  # fmt: skip
    odd = [f"{name} {ours}, the model's has {theirs}" for name, (ours, theirs) in facts.items() if ours != theirs]
    if odd:
        advice = "Set `reuse: false`" if card.encoder is not None else "Fit a tokenizer to this encoder"
        told = "; ".join(odd)
        raise ModelError(f"the tokenizer {folder} does not fit the model's encoder: its own has {told}. {advice}")


def check_weights(card: Card, encoder: Any, folder: Path) -> None:
    """Raises `ModelError` unless the model's encoder has, bit for bit, the weights that a tokenizer was made with."""
    found = digests(encoder, card.layer)
    if not any(card.digests.get(dtype) == digest for dtype, digest in found.items()):
        own = "Set `reuse: false`, and it runs the encoder that is in its folder" if card.encoder is not None else (
            "Take the encoder that it was fitted to, or fit a tokenizer to this one"
        )  # fmt: skip
        raise ModelError(f"the tokenizer {folder} quantises features of an encoder with other weights. {own}")


def digests(encoder: Encoder, layer: Layer) -> dict[str, str]:
    """SHA-256 of an encoder's weights up to a layer, by dtype: in their own if that is bfloat16, else also rounded."""
    encoder = getattr(encoder, "wrapped", encoder)
    blocks = encoder.blocks()
    index = layer_index(layer, len(blocks))
    unread = [] if index == END else blocks[index:]
    after = {id(value) for block in unread for value in block.state_dict(keep_vars=True).values()}
    chosen = {name: value for name, value in encoder.state_dict(keep_vars=True).items() if id(value) not in after}
    half = all(value.dtype is torch.bfloat16 for value in chosen.values() if value.is_floating_point())
    return {text: _digest(chosen, dtype) for dtype, text in _DTYPES.items() if dtype is torch.bfloat16 or not half}


def _digest(state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach()
        gather = getattr(value, "full_tensor", None)  # of a sharded model
        value = (gather() if gather else value).to("cpu", dtype if value.is_floating_point() else value.dtype)
        total.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        total.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()
