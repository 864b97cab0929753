"""Published image tokenizers, in their authors' layouts, as diffusers models.

Two layouts are known. LDM's (CompVis; also of taming-transformers and FLUX): `encoder.down.I.block.J`, attention as
`attn.J`, `mid.block_1`, the decoder's levels numbered from the finest. LlamaGen's: `encoder.conv_blocks.I.res.J`,
`mid.0`, the decoder's levels in the order in which they run. The blocks are the same, so both are first renamed to what
diffusers calls them; the architecture is then read off the shapes. diffusers' own single-file loading does not serve:
it drops the attention inside of levels, which both published models have, and does not know LlamaGen's layout.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveate.errors import ModelError

_GROUPS = 32
"""Groups of all group norms, in both layouts; not to be seen from the weights."""

_LDM = (
    (r"(encoder|decoder)\.mid\.block_([12])\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
    (r"(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
)
_LLAMAGEN = (
    (r"(encoder|decoder)\.mid\.([02])\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) // 2}."),
    (r"(encoder|decoder)\.mid\.1\.", r"\1.mid_block.attentions.0."),
    (r"encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.conv_blocks\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"encoder\.conv_blocks\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.conv_blocks\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"decoder\.conv_blocks\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
)
_BOTH = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
_LEFT_OUT = ("loss.", "model_ema.", "quantize.codebook_used")
"""What only training needs: discriminator and perceptual loss, running averages, counts."""
_NESTS = ("ema", "state_dict", "model")
"""Where checkpoints keep their weights: an average of them, if there is one, is what its authors evaluate."""
_INSIDE = "first_stage_model."
"""Where a whole latent diffusion model keeps its autoencoder."""


@dataclass
class Tokenizer:
    """A tokenizer in diffusers' terms: its class by `kind`, its config, its weights, and what to tell about it."""

    kind: Literal["autoencoder_kl", "vq"]
    layout: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    def set_scale(self, scaling: float | None, shift: float | None) -> None:
        """Scale and shift of a KL autoencoder's latents, `(z - shift) * scaling`; says so where nobody knows them."""
        known: float | None = self.config.pop("scaling_factor", None)
        if scaling is None and known is None:
            self.notes.append(
                "The file does not tell the scale of the latents: scaling_factor is 1. Give --scaling-factor, or "
                "measure it on your pictures with `fit: {steps: 0}` beside `pretrained`."
            )
        self.config |= {"scaling_factor": scaling or known or 1.0, "shift_factor": shift}

    def describe(self) -> str:
        """Type, size and shape in a sentence."""
        config, depth = self.config, len(self.config["block_out_channels"])
        where = [level + 1 for level, kind in enumerate(config["down_block_types"]) if kind.startswith("Attn")]
        parts = [
            f"{_class_of(self.kind).__name__}, from the layout of {self.layout}",
            f"{depth} levels of {', '.join(map(str, config['block_out_channels']))} channels, "
            f"{config['layers_per_block']} blocks each",
            f"attention in level {', '.join(map(str, where))}" if where else "no attention in its levels",
            f"{2 ** (depth - 1)} pixels a side of a latent",
            f"{config['latent_channels']} latent channels"
            if self.kind == "autoencoder_kl"
            else f"{config['num_vq_embeddings']:,} codes of {config['vq_embed_dim']} numbers",
            f"{sum(tensor.numel() for tensor in self.weights.values()):,} parameters",
        ]
        return "; ".join(parts)

    def save(self, folder: Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors: both, or nothing."""
        model = _on_meta(self.kind, self.config)
        model.load_state_dict(self.weights, assign=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise ModelError(f"cannot write {folder}: {error}") from error
        try:
            model.save_pretrained(aside, safe_serialization=True)
            mask = os.umask(0)  # reading it means setting it
            os.umask(mask)
            aside.chmod(0o777 & ~mask)
            for file in aside.iterdir():
                file.chmod(0o666 & ~mask)
            os.replace(aside, folder)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot write {folder}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a file of weights holds, read without running anything in it. Raises `ModelError`."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = _unpickled(path)
    except ModelError:
        raise
    except Exception as error:  # whatever a broken file makes of torch and safetensors
        told = str(error).strip().splitlines()
        raise ModelError(
            f"{path} cannot be read as a checkpoint of torch or a file of safetensors; an archive has to be unpacked "
            f"first. {type(error).__name__}: {told[0] if told else ''}"
        ) from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds a {type(content).__name__}, and not a mapping of names to weights.")
    return dict(content)


class _StandIn:
    """Takes the place of a class of Lightning in a checkpoint; such describe the training, and none is used."""

    def __init__(self, *_: object) -> None:
        pass


def _unpickled(path: Path) -> Any:
    """`torch.load` of weights only. Files of Lightning name its callbacks' classes, which are not imported here."""
    known: list[Any] = []
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        lightning = re.compile(r"(pytorch_lightning|lightning|lightning_fabric)\.")
        if other := sorted(name for name in names if not lightning.match(name)):
            raise ModelError(
                f"{path} holds pickled code ({', '.join(other[:3])}), which is never run. Where you trust it, save its "
                "weights alone, best as safetensors."
            )
        known = [(_StandIn, name) for name in names]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", weights_only=True)


def convert(content: Mapping[str, Any], source: str, plain_codebook: bool = False) -> Tokenizer:
    """A checkpoint's content as a tokenizer of diffusers.

    Every weight is used, or left out and told. `source` names the file in errors. `plain_codebook`: of LlamaGen's
    codebook the rows are used as they are, and not scaled to norm 1. Raises `ModelError`.
    """
    notes = list[str]()
    weights = _weights(content, source, notes)
    layout = _layout(weights, source)
    found = Tokenizer("autoencoder_kl", layout, {}, {}, notes)
    scale = weights.pop("scale_factor", None)
    renamed = dict(_renamed(weights, layout, source))
    if "quantize.embedding.weight" in renamed:
        found.kind = "vq"
        if layout == "LlamaGen" and not plain_codebook:
            # LlamaGen looks for the nearest direction: among rows of norm 1 the nearest row, as in diffusers
            renamed["quantize.embedding.weight"] = F.normalize(renamed["quantize.embedding.weight"], dim=-1)
            notes.append("The codebook's rows are scaled to norm 1, as LlamaGen reads them.")
    found.config = _architecture(renamed, found.kind, source)
    if scale is not None and found.kind == "autoencoder_kl":
        found.config["scaling_factor"] = float(scale)
    found.weights = renamed
    _check(found, source)
    return found


def _weights(content: Mapping[str, Any], source: str, notes: list[str]) -> dict[str, Tensor]:
    """The tokenizer's tensors by their own names, out of whatever they are nested in."""
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping):
            rest = sorted(str(key) for key in content if key != nest)
            notes += [f"Read from '{nest}'; left out beside it: {', '.join(rest)}."] if rest else []
            content = content[nest]
            break
    if any(str(key).startswith(_INSIDE) for key in content):
        own = {key.removeprefix(_INSIDE): content[key] for key in content if key.startswith(_INSIDE)}
        own |= {key: content[key] for key in ("scale_factor",) if key in content}
        notes.append(f"Read from {_INSIDE}*; left out: the {len(content) - len(own)} other entries of the model.")
        content = own
    left = Counter[str]()
    kept: dict[str, Tensor] = {}
    for key, value in content.items():
        head = next((head for head in _LEFT_OUT if str(key).startswith(head)), None)
        if head is not None:
            left[head] += 1
        elif not isinstance(value, Tensor):
            raise ModelError(f"{source}: '{key}' is no tensor, but {type(value).__name__}: not the weights of a model.")
        else:
            kept[str(key)] = value
    names = (f"{number} of {head}*" if head.endswith(".") else head for head, number in left.items())
    notes += [f"Left out, only training needs it: {', '.join(names)}."] if left else []
    return kept


def _layout(weights: Mapping[str, Tensor], source: str) -> str:
    for layout, start in (("LlamaGen", "encoder.conv_blocks."), ("LDM", "encoder.down.")):
        if any(key.startswith(start) for key in weights):
            return layout
    if any(key.startswith("encoder.down_blocks.") for key in weights):
        raise ModelError(f"{source} is in the layout of diffusers already: a teacher loads the folder that it lies in.")
    names = ", ".join(list(weights)[:4])
    raise ModelError(f"{source} has neither LDM's nor LlamaGen's layout; its weights are called {names or 'nothing'}.")


def _renamed(weights: Mapping[str, Tensor], layout: str, source: str) -> Iterator[tuple[str, Tensor]]:
    """The same weights by diffusers' names, in float32; 1x1 convolutions of attention as linear layers."""
    rules = (*(_LDM if layout == "LDM" else _LLAMAGEN), *_BOTH)
    levels = [int(match[1]) for key in weights if (match := re.match(r"decoder\.up\.(\d+)\.", key))]
    for key, tensor in weights.items():
        if not tensor.is_floating_point() or not (tensor.is_meta or tensor.isfinite().all()):
            raise ModelError(f"{source}: '{key}' holds {tensor.dtype} or values that are not finite.")
        name = key
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if layout == "LDM":  # numbered from the finest; diffusers' run from the coarsest
            name = re.sub(r"(decoder\.up_blocks)\.(\d+)", lambda m: f"{m[1]}.{max(levels) - int(m[2])}", name)
        if re.search(r"\.attentions\.\d+\.to_.*\.weight$", name) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        yield name, tensor.float().contiguous()


def _architecture(weights: Mapping[str, Tensor], kind: str, source: str) -> dict[str, Any]:
    """The fields of the diffusers config, read off names and shapes."""

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ModelError(f"{source} lacks weights: there is no {name} (in diffusers' terms).")
        return weights[name].shape

    def numbers(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in weights if (match := re.match(pattern, name))})

    levels = numbers(r"encoder\.down_blocks\.(\d+)\.")
    blocks = numbers(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    if not blocks or levels != list(range(len(levels))):
        raise ModelError(f"{source} lacks weights: its encoder has levels {levels}, {len(blocks)} blocks in level 0.")
    channels = [shape(f"encoder.down_blocks.{level}.resnets.0.conv2.weight")[0] for level in levels]
    down = [bool(numbers(rf"encoder\.down_blocks\.{level}\.attentions\.(\d+)\.")) for level in levels]
    up = [bool(numbers(rf"decoder\.up_blocks\.{level}\.attentions\.(\d+)\.")) for level in levels]
    config = {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": channels,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in up],
        "layers_per_block": len(blocks),
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "norm_num_groups": _GROUPS,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
    }
    if kind == "vq":
        codes, width = shape("quantize.embedding.weight")
        return {**config, "num_vq_embeddings": codes, "vq_embed_dim": width}
    sides = {"use_quant_conv": "quant_conv.weight", "use_post_quant_conv": "post_quant_conv.weight"}
    return {**config, **{option: name in weights for option, name in sides.items()}}


def _check(found: Tokenizer, source: str) -> None:
    """Raises `ModelError` unless the weights are exactly those of the architecture."""
    try:
        model = _on_meta(found.kind, found.config)
    except Exception as error:  # diffusers raises what it likes
        raise ModelError(f"{source}: diffusers cannot build {json.dumps(found.config)}: {error}") from error
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in found.weights.items()}
    defects = [f"it lacks {name}" for name in wanted if name not in given]
    defects += [f"nothing is known of {name}" for name in given if name not in wanted]
    defects += [
        f"{name} is {'x'.join(map(str, given[name]))} and should be {'x'.join(map(str, shape))}"
        for name, shape in wanted.items() if name in given and given[name] != shape
    ]  # fmt: skip
    if defects:
        more = f" and {len(defects) - 4} more" if len(defects) > 4 else ""
        raise ModelError(
            f"{source} looks like a {_class_of(found.kind).__name__} in the layout of {found.layout}, but "
            f"(by diffusers' names) {'; '.join(defects[:4])}{more}."
        )


def _class_of(kind: str) -> Any:
    return AutoencoderKL if kind == "autoencoder_kl" else VQModel


def _on_meta(kind: str, config: Mapping[str, Any]) -> Any:
    """The model without memory for weights."""
    diffusers_logging.disable_progress_bar()
    with torch.device("meta"):
        return _class_of(kind)(**config).eval()
