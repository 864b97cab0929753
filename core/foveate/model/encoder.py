"""The vision encoder: the base class, and CLIP, SigLIP and DINOv2 of transformers, built only as deep as they are read.

Shapes: I images, H = W = `spec.image_size` pixels, h*w = `spec.grid` features of an image, C = `spec.width`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers as hf
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file, logging

from foveate.errors import ModelError
from foveate.options import FolderOrId, Options
from foveate.types import EncoderSpec

Rgb = tuple[float, float, float]
DEEPEST = 2000
"""Blocks of a part, at most: a slip of the keyboard would build for hours."""
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Encoder(nn.Module, ABC):
    """Base of vision encoders. `spec` says what comes out; `describe` says it without weights."""

    Options: type[Options] = Options
    spec: EncoderSpec

    @classmethod
    @abstractmethod
    def describe(cls, options: Any) -> EncoderSpec:
        """What an encoder with these options is, without its weights. Raises `ModelError`."""

    @abstractmethod
    def __init__(self, options: Any, load_weights: bool = True) -> None:
        """Build it; `load_weights=False` leaves pretrained weights unread (a checkpoint follows)."""
        super().__init__()

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the selected layer, row by row: `[I, 3, H, W]` → `[I, h*w, C]`."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks that run, first to last."""

    @abstractmethod
    def portable_options(self) -> dict[str, Any]:
        """Options that rebuild this module, and its state-dict keys, without network and without weights."""


@dataclass(frozen=True)
class Family:
    """What encoders of one `model_type` share: class, blocks, final norm, CLS tokens, and how pixels are made."""

    model: Any
    blocks: str
    norm: str
    cls_tokens: int
    image_processor: str
    mean: Rgb
    std: Rgb


_CLIP: tuple[Rgb, Rgb] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: tuple[Rgb, Rgb] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET: tuple[Rgb, Rgb] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_VIT = ("encoder.layers", "post_layernorm")
_DINO = ("encoder.layer", "layernorm", 1, "BitImageProcessor", *_IMAGENET)
FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(hf.CLIPVisionModel, *_VIT, 1, "CLIPImageProcessor", *_CLIP),
    "siglip_vision_model": Family(hf.SiglipVisionModel, *_VIT, 0, "SiglipImageProcessor", *_HALF),
    "dinov2": Family(hf.Dinov2Model, *_DINO),
    "dinov2_with_registers": Family(hf.Dinov2WithRegistersModel, *_DINO),
}
"""The encoders that are known to work. SigLIP 2 at a fixed resolution is a `siglip_vision_model`."""


class TransformersEncoderOptions(Options):
    """CLIP, SigLIP, SigLIP 2 (fixed resolution) or DINOv2, pretrained, or from scratch by `config`."""

    pretrained: FolderOrId | None = Field(None, description="Hub id or folder (safetensors). Default: random weights.")
    revision: str = Field("main", description="Hub revision (branch, tag or commit) of `pretrained`.")
    config: dict[str, Any] | None = Field(
        None, description=f"The architecture: `model_type` ({', '.join(FAMILIES)}) and fields of its transformers "
        "config. Default: that of `pretrained`."
    )  # fmt: skip
    layer: int | None = Field(
        None, description="Which features: 0 the embeddings, k the output of block k, -1 of the last block, before the "
        "final norm. Later blocks are not built. Default: -2 of pretrained encoders, as LLaVA; -1 from scratch."
    )  # fmt: skip
    select: Literal["patch", "full"] = Field(
        "patch", description="`patch`: features of patches only. `full`: CLS and register tokens too, if there are any."
    )
    mean: Rgb | None = Field(None, description="Pixel mean a channel. Default: of `pretrained`, else of the family.")
    std: Rgb | None = Field(None, description="Pixel deviation a channel. Default: as for `mean`.")
    resample: Filter | None = Field(None, description="Resizing filter. Default: of `pretrained`, else bicubic.")
    position_std: float | None = Field(
        None, gt=0, description="From scratch: deviation of the position embeddings at the start. Families use 0.02 to "
        "0.1; about 1 lets a tiny model find places hundreds of steps earlier."
    )  # fmt: skip
    attn: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation.")

    @model_validator(mode="after")
    def _check(self) -> TransformersEncoderOptions:
        if self.config is not None:
            _configure(self.config)
        elif self.pretrained is None:
            raise ValueError("give `pretrained` (hub id or folder), `config` (from scratch), or both")
        if self.position_std and self.pretrained is not None:
            raise ValueError("`position_std` is for encoders from scratch; `pretrained` brings position embeddings")
        return self


class TransformersEncoder(Encoder):
    """A vision tower of transformers, cut after the selected layer.

    Blocks after it, the final norm, pooling heads and mask tokens are not kept: nothing reads them. A stock Llava with
    as many layers as were kept and ``vision_feature_layer=-1`` computes the same. State-dict keys are ``model.`` and
    the transformers module's own.
    """

    Options = TransformersEncoderOptions

    @classmethod
    def describe(cls, options: TransformersEncoderOptions) -> EncoderSpec:
        return _describe(options, _architecture(options))

    def __init__(self, options: TransformersEncoderOptions, load_weights: bool = True) -> None:
        super().__init__(options, load_weights)
        config = _architecture(options)
        self.spec, self._options, self._family = _describe(options, config), options, FAMILIES[config.model_type]
        if load_weights and options.pretrained is not None:
            self.model, _ = read_pretrained(
                self._family.model, options.pretrained, unused=(self._family.norm,), revision=options.revision,
                config=config, dtype="float32", attn_implementation=options.attn,
            )  # fmt: skip
        else:
            self.model = self._family.model._from_config(config, attn_implementation=options.attn)
            for name, parameter in self.model.named_parameters():
                if options.position_std and "position_embedding" in name:
                    nn.init.normal_(parameter, std=options.position_std)
        setattr(self.model, self._family.norm, nn.Identity())
        if hasattr(self.model.embeddings, "mask_token"):
            self.model.embeddings.mask_token = None

    def forward(self, pixels: Tensor) -> Tensor:
        size, (rows, columns) = self.spec.image_size, self.spec.grid
        if pixels.shape[1:] != (3, size, size):
            raise ModelError(f"the encoder takes pixels [I, 3, {size}, {size}] and got {list(pixels.shape)}")
        return self.model(pixel_values=pixels).last_hidden_state[:, -rows * columns :]

    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self._family.blocks).children())

    def portable_options(self) -> dict[str, Any]:
        kept = self._options.model_dump(include={"select", "attn"})
        kept |= {"mean": self.spec.mean, "std": self.spec.std, "layer": -1, "config": config_fields(self.model.config)}
        return {**kept, "resample": Image.Resampling(self.spec.resample).name.lower()}


def config_fields(config: Any) -> dict[str, Any]:
    """The fields that make the architecture, without what every transformers config has and what is derived."""
    own = type(config)().to_dict().keys() - PreTrainedConfig().to_dict().keys() | {"model_type"}
    return {key: getattr(config, key) for key in sorted(own - {"stage_names", "out_features", "out_indices"})}


def _configure(mapping: dict[str, Any]) -> Any:
    """A config from `model_type` and fields; ValueError for unknown families, unknown fields and wrong types."""
    if (model_type := str(mapping.get("model_type"))) not in FAMILIES:
        hint = " (NaFlex has no fixed grid: take a fixed resolution)" if "siglip2" in model_type else ""
        raise ValueError(f"no encoder '{model_type}'{hint}; known to work are {', '.join(FAMILIES)} and `type: timm`")
    known = FAMILIES[model_type].model.config_class
    if unknown := sorted(mapping.keys() - known().to_dict().keys() - {"torch_dtype"}):
        raise ValueError(f"{known.__name__} has no field {', '.join(unknown)}")
    try:
        return known(**{key: value for key, value in mapping.items() if key != "model_type"})
    except Exception as error:  # transformers' strict configs raise types of their own
        raise ValueError(f"{known.__name__}: {error}") from error


def _architecture(options: TransformersEncoderOptions) -> Any:
    """The config of what will be built: only as many layers as are run, no head, no mask token."""
    if options.config is not None:
        config = _configure(options.config)
    else:
        try:
            settings = {"revision": options.revision, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(str(options.pretrained), **settings)
            config = config.vision_config if config.model_type in ("clip", "siglip") else config
            config = _configure(config_fields(config))
        except Exception as error:  # errors of hub, network and parsing have no common base
            raise ModelError(
                f"cannot read the architecture of encoder '{options.pretrained}'. Check the name; without network, "
                f"give a local folder, or a preset of registry.yaml or `config:`, which carry the architecture. {error}"
            ) from error
    count = config.num_hidden_layers
    layer = options.layer if options.layer is not None else (-2 if options.pretrained and count > 1 else -1)
    kept = layer if layer >= 0 else count + 1 + layer
    if count > DEEPEST:
        raise ModelError(f"the encoder has {count} blocks; {DEEPEST} can be built at most")
    if not 0 <= kept <= count:
        raise ModelError(f"the encoder has {count} blocks, so its layers are {-count - 1} to {count}, not {layer}")
    unread = {"vision_use_head": False, "use_mask_token": False}
    fields = config_fields(config)
    return _configure(fields | {key: unread[key] for key in fields.keys() & unread} | {"num_hidden_layers": kept})


def _describe(options: TransformersEncoderOptions, config: Any) -> EncoderSpec:
    family, size, patch = FAMILIES[config.model_type], config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise ModelError(f"encoders take squares of one patch or more; image_size is {size} and patch_size {patch}")
    heads, width = config.num_attention_heads, config.hidden_size
    if config.num_channels != 3 or not 0 < heads <= width or width % heads:
        raise ModelError("encoders need num_channels 3, and a hidden_size that num_attention_heads divides")
    side = size // patch  # SigLIP so400m takes 384 pixels with patches of 14: the last 6 are not read
    prefix = family.cls_tokens + getattr(config, "num_register_tokens", 0) if options.select == "full" else 0
    stated = options.pretrained is not None and (options.config is None or Path(options.pretrained).is_dir())
    facts: dict[str, Any] = {"mean": family.mean, "std": family.std, "resample": "bicubic"}
    facts |= read_image_processor(str(options.pretrained), options.revision) if stated else {}
    facts |= options.model_dump(include=set(facts), exclude_none=True)
    grid, resample = (1, side * side + prefix) if prefix else (side, side), Image.Resampling[facts["resample"].upper()]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return EncoderSpec(size, grid, config.hidden_size, mean, std, resample, family.image_processor)


def read_image_processor(source: str, revision: str = "main") -> dict[str, Any]:
    """`mean`, `std` and `resample`, as options, as far as the image processor of a folder or hub id states them."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            stated = json.loads(Path(path).read_text(encoding="utf-8"))
            stated = stated.get("image_processor", stated)
            facts = {"mean": stated.get("image_mean"), "std": stated.get("image_std")}
            facts |= {"resample": Image.Resampling(stated["resample"]).name.lower()} if "resample" in stated else {}
            return {key: value for key, value in facts.items() if value is not None}
    return {}


def read_pretrained(model: Any, source: str, unused: tuple[str, ...] = (), **settings: Any) -> tuple[Any, list[str]]:
    """`model.from_pretrained(source)`, from safetensors only, and the weights of `source` that it has no place for.

    Raises `ModelError` when `source` lacks weights, but for names that start as one of `unused`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # weights are left out on purpose; we check the names ourselves
    try:
        loaded, report = model.from_pretrained(source, use_safetensors=True, output_loading_info=True, **settings)
    except Exception as error:  # errors of hub, files and shapes have no common base
        raise ModelError(f"cannot load the weights of '{source}' (from safetensors only): {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith(unused)):
        raise ModelError(f"'{source}' lacks {len(missing)} weights of {model.__name__}: {', '.join(missing[:8])} …")
    return loaded, sorted(report["unexpected_keys"])
