"""Reading a published checkpoint of a semantic tokenizer, in the layout of DualToken, into a tokenizer's folder.

The file holds a SigLIP of its own (`….embeddings.patch_embedding.weight`, `….encoder.layers.K.…`), and one codebook a
depth, `…quantizer_semantic.codebooks.D.weight`, whose last row is padding. Anything else in it is told and not read.
The features are those after the last block but one, not normalised: block 26 of 27 in the published one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from foveate.errors import ModelError
from foveate.model.build import load_strictly
from foveate.model.encoder import TransformersEncoder, TransformersEncoderOptions
from foveate_asvr.folder import Card, digests, write_folder

PATCHES = "embeddings.patch_embedding.weight"
CODEBOOK = re.compile(r"(?:^|.*\.)quantizer_semantic\.codebooks\.(\d+)\.weight$")
HEAD = ("head.", "post_layernorm.")
"""Weights of a SigLIP that come after its blocks."""

KNOWN = {(1152, 27): {"num_attention_heads": 16, "image_size": 384}}
"""By width and side of the grid, what the shapes of weights do not tell: of SigLIP SO400M/14 at 384 pixels."""


@dataclass(frozen=True)
class Found:
    """What an import has read: the card, and the weights of the file that it left, counted by where they stand."""

    card: Card
    blocks: int
    parameters: int
    unread: Mapping[str, int]


def import_tokenizer(
    source: Path, folder: Path, layer: int | None = None, image_size: int | None = None, heads: int | None = None
) -> Found:
    """Reads `source` (.safetensors, or .bin, .pt and .pth of tensors alone) and writes the tokenizer to `folder`.

    `layer`: the block whose output is quantised; default: the last but one. `image_size` and `heads`: where the encoder
    is not one of `KNOWN`. Raises `ModelError` for whatever is missing, double, or of another shape.
    """
    state = _read(source)
    prefix = _prefix(source, state)
    books, size, width = _codebooks(source, state)
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    config, blocks = _config(source, own, image_size, heads)
    if width != config["hidden_size"]:
        raise ModelError(f"{source}: codebooks of width {width}, and features of width {config['hidden_size']}")
    kept = blocks - 1 if layer is None else layer
    if not 0 <= kept <= blocks:
        raise ModelError(f"--layer {kept}: the encoder of {source} has {blocks} blocks")
    options = TransformersEncoderOptions.model_validate({"config": config, "layer": kept, "mean": None, "std": None})
    encoder = TransformersEncoder(options)
    read = {key: value for key, value in own.items() if _block(key) < kept and not key.startswith(HEAD)}
    load_strictly(encoder, {f"model.{key}": value for key, value in read.items()}, ("",), f"the encoder in {source}")
    described = {"type": "hf", **encoder.portable_options()}
    card = Card(
        "semantic", len(books), size, width, False, encoder.spec.grid, kept, encoder.spec,
        digests(encoder, -1), described,
    )  # fmt: skip
    write_folder(folder, card, {"quantizer.codebooks": torch.stack(books)}, encoder)
    used = {*(prefix + key for key in own), *(key for key in state if CODEBOOK.match(key))}
    unread = Counter(key.split(".")[0] if "." in key else key for key in state if key not in used)
    return Found(card, blocks, sum(value.numel() for value in encoder.state_dict().values()), dict(unread))


def _read(source: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name; nothing but tensors is unpickled."""
    if not source.is_file():
        raise ModelError(f"no such file: {source}. Give the checkpoint itself (.safetensors, .bin, .pt or .pth)")
    try:
        content: Any = (
            load_file(source)
            if source.suffix == ".safetensors"
            else torch.load(source, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # safetensors, pickle and zip raise what they like
        raise ModelError(f"{source} cannot be read as tensors alone: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{source} is no mapping of names to tensors, nor has one as state_dict, model or module")
    return {str(key): value for key, value in content.items()}


def _prefix(source: Path, state: Mapping[str, Tensor]) -> str:
    """What the names of the encoder's weights begin with."""
    found = [key.removesuffix(PATCHES) for key in state if key.endswith(PATCHES)]
    if len(found) != 1:
        what = "no encoder" if not found else f"{len(found)} encoders ({', '.join(found)})"
        raise ModelError(f"{source} holds {what}: one weight …{PATCHES} is needed")
    return found[0]


def _codebooks(source: Path, state: Mapping[str, Tensor]) -> tuple[list[Tensor], int, int]:
    """The codebooks without their padding row, by depth; how many codes they have, and how wide these are."""
    matched = {int(match[1]): value for key, value in state.items() if (match := CODEBOOK.match(key))}
    count = sum(1 for key in state if CODEBOOK.match(key))
    if not matched or sorted(matched) != list(range(count)):
        numbers = ", ".join(map(str, sorted(matched))) or "none"
        raise ModelError(
            f"{source}: codebooks …quantizer_semantic.codebooks.D.weight are needed for D from 0 on, once each; "
            f"there are {numbers}"
        )
    shapes = {tuple(value.shape) for value in matched.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ModelError(f"{source}: codebooks of different shapes: {', '.join(map(str, sorted(shapes)))}")
    rows, width = next(iter(shapes))
    if padded := [depth for depth, value in matched.items() if rows < 3 or bool(value[-1].any())]:
        raise ModelError(
            f"{source}: the last row of codebook {padded[0]} is not the padding (zeros) that this layout has; it is "
            "another layout, and its codes would be others"
        )
    if broken := [depth for depth, value in matched.items() if not bool(value.isfinite().all())]:
        raise ModelError(f"{source}: codebook {broken[0]} holds values that are not finite")
    return [matched[depth][:-1].float() for depth in range(count)], rows - 1, width


def _block(key: str) -> int:
    """The block, from 0, that a weight is of; -1 for what comes before all blocks."""
    match = re.match(r"encoder\.layers\.(\d+)\.", key)
    return int(match[1]) if match else -1


def _config(
    source: Path, own: Mapping[str, Tensor], image_size: int | None, heads: int | None
) -> tuple[dict[str, Any], int]:
    """The encoder's config from the shapes of its weights, and how many blocks the file has of it."""
    blocks = 1 + max((_block(key) for key in own), default=-1)
    try:
        width, _, patch, _ = own[PATCHES].shape
        places = own["embeddings.position_embedding.weight"].shape[0]
        inner = own["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelError(f"{source}: its encoder is not a complete SigLIP: {error}") from error
    side = round(places**0.5)
    known = KNOWN.get((width, side), {})
    heads, image_size = heads or known.get("num_attention_heads"), image_size or known.get("image_size")
    if heads is None or image_size is None:
        raise ModelError(
            f"{source}: an encoder of width {width} on {side} x {side} patches of {patch} pixels; weights do not tell "
            f"its attention heads and its image size (such as {side * patch}): give --heads and --image-size"
        )
    if width % heads or side * side != places or image_size // patch != side:
        raise ModelError(
            f"{source}: {heads} heads, {image_size} pixels: the encoder has width {width}, {places} places and patches "
            f"of {patch} pixels"
        )
    config = {
        "model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "image_size": image_size, "patch_size": patch,
        "vision_use_head": False,
    }  # fmt: skip
    return config, blocks
