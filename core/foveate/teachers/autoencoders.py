"""Teachers `autoencoder_kl` and `vq`: latents of diffusers' image autoencoders, on the grid of the visual tokens.

Shapes: I images, (h, w) grid of visual tokens, N = h*w, p side of a visual token's square of latents (`patch`), C
channels of a latent, so that a row is C*p*p wide.

A KL autoencoder can be fitted to the user's own pictures (`fit`, in `autoencoder_fit.py`). Its latents' shift and scale
are then weights of the teacher, found with it, and no longer those of the config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from transformers.utils import cached_file

from foveate.errors import ModelError
from foveate.explain import said_at
from foveate.objective import ObjectiveContext, Teacher, TeacherInputs, TeacherSpec
from foveate.options import FolderOrId, Options
from foveate.teachers.autoencoder_fit import FitOptions, fit
from foveate.teachers.patches import full, resized, signed, to_maps, to_rows, unit
from foveate.types import ImageRecord


class AutoencoderOptions(Options):
    """An image autoencoder in the format of diffusers, pretrained, or from scratch by `config`."""

    pretrained: FolderOrId | None = Field(None, description="Hub id or folder (safetensors). Default: random weights.")
    subfolder: str = Field("", description="Where in `pretrained` it lies, such as vae.")
    revision: str = Field("main", description="Hub revision (branch, tag or commit) of `pretrained`.")
    config: dict[str, Any] | None = Field(
        None, description="The architecture: fields of its diffusers config. Default: that of `pretrained`."
    )
    patch: int | None = Field(
        None, gt=0, description="Latents a side that one visual token stands for, packed into its row (2: as FLUX "
        "packs). Default: 1; for an architecture that `fit` makes, 16 pixels' worth."
    )  # fmt: skip
    published: str | None = Field(
        None, description="Where its weights are published in a layout of their own: `foveate import teacher` makes a "
        "folder of them for `pretrained`, without which nothing is trained."
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> AutoencoderOptions:
        if self.pretrained is None and self.architecture() is None:
            raise ValueError("give `pretrained` (hub id or folder), `config` (from scratch), or both")
        return self

    def architecture(self) -> dict[str, Any] | None:
        """Fields of the diffusers config, where they are not those of `pretrained`."""
        return self.config

    def latents(self) -> int:
        """Latents a side of a visual token."""
        return self.patch or 1


class KLOptions(AutoencoderOptions):
    """A KL autoencoder in the format of diffusers: pretrained, or from scratch by `config`, or fitted by `fit`."""

    fit: FitOptions | None = Field(
        None, description="Fit it to the pictures of the objective's first stage: options of the fit, `{}` for the "
        "defaults. It starts from `pretrained`, or from random weights."
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_fit(self) -> KLOptions:
        if self.fit is None:
            return self
        if (self.pretrained or self.config) and (self.fit.channels or self.fit.latent_channels):
            raise ValueError("`channels` and `latent_channels` of `fit` are for one without `config` and `pretrained`")
        if not (self.fit.steps or self.pretrained or self.published):
            raise ValueError("`fit: {steps: 0}` only measures: give `pretrained` too")
        return self

    def architecture(self) -> dict[str, Any] | None:
        return self.config if self.fit is None or self.config or self.pretrained else self.fit.architecture()

    def latents(self) -> int:
        made = self.fit is not None and not (self.config or self.pretrained)
        return self.patch or (self.fit.patch() if made and self.fit else 1)


class VQOptions(AutoencoderOptions):
    """A VQ autoencoder in the format of diffusers, pretrained, or from scratch by `config`."""

    @model_validator(mode="before")
    @classmethod
    def _no_fit(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "fit" in value:
            raise said_at("teacher vq cannot be fitted; `type: autoencoder_kl` can", "fit")
        return value


class _Autoencoder(Teacher):
    """What both share: reading, building, and pictures of as many pixels as the grid of latents asks for."""

    Options = AutoencoderOptions
    model_class: ClassVar[Any]

    @classmethod
    def describe(cls, options: AutoencoderOptions, context: ObjectiveContext) -> TeacherSpec:
        config, (rows, columns), side = cls._config(options), context.visual_grid, cls._side(options)
        width = (config.get("vq_embed_dim") or config["latent_channels"]) * options.latents() ** 2
        return TeacherSpec(width, context.visual_grid, (rows * side, columns * side))

    @classmethod
    def prepare_image(cls, options: AutoencoderOptions, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """`pixels` `[3, H, W]` uint8."""
        return {"pixels": resized(image, record.grid, cls._side(options))}

    def __init__(self, options: AutoencoderOptions, context: ObjectiveContext):
        super().__init__(options, context)
        self.config = self._config(options)
        self.model = _build(self.model_class, options, self.config)

    @classmethod
    def _config(cls, options: AutoencoderOptions) -> Mapping[str, Any]:
        own = options.architecture()
        given = None if own is None else json.dumps(own, sort_keys=True)
        return _read_config(cls.model_class, options.pretrained, options.subfolder, options.revision, given)

    @classmethod
    def _side(cls, options: AutoencoderOptions) -> int:
        """Pixels a side of a visual token."""
        return 2 ** (len(cls._config(options)["block_out_channels"]) - 1) * options.latents()

    def _latents(self, inputs: TeacherInputs) -> Any:
        return self.model.encode(signed(inputs.stack("pixels"), self.model.dtype))

    def _maps(self, rows: Tensor) -> Tensor:
        return to_maps(full(rows), self.context.visual_grid, self.options.latents())


class KLTeacher(_Autoencoder):
    """Records the posterior of the latents z = (sample - shift) * scale: `mean` and `logvar`, `[N, C*p*p]` each.

    Entry c*p*p + row*p + column of a row is channel c of the latent at (row, column) of the token's square. `shift` and
    `scale` are the fit's, or else the config's, by channel where it has `latents_mean` and `latents_std`.
    """

    Options = KLOptions
    model_class = AutoencoderKL
    shift: Tensor
    scale: Tensor

    def __init__(self, options: KLOptions, context: ObjectiveContext):
        super().__init__(options, context)
        if options.fit is not None:
            self.register_buffer("shift", torch.zeros(1))
            self.register_buffer("scale", torch.ones(1))

    @classmethod
    def needs_fit(cls, options: KLOptions) -> bool:
        return options.fit is not None

    def fit(self, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        """Tells `psnr_db` on pictures held out, `shift_factor` and `scaling_factor` of the latents, their `kl` in nats
        a number, and how many `pictures` there were, `held_out` among them."""
        options: KLOptions = self.options
        assert options.fit is not None
        told = fit(self.model, batches, options.fit, self._side(options), self.context.seed)
        self.shift.fill_(told["shift_factor"])
        self.scale.fill_(told["scaling_factor"])
        return told

    def save(self, folder: Path) -> None:
        """The fitted autoencoder as a diffusers folder, for `pretrained`."""
        found = {"shift_factor": float(self.shift), "scaling_factor": float(self.scale)}
        self.model.register_to_config(**found, latents_mean=None, latents_std=None)
        self.model.save_pretrained(folder, safe_serialization=True)

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        posterior = self._latents(inputs).latent_dist
        mean, logvar = full(posterior.mean), full(posterior.logvar)
        shift, scale = self._shift_and_scale(mean)
        mean, logvar, side = (mean - shift) * scale, logvar + 2 * scale.log(), self.options.latents()
        rows = zip(to_rows(mean, side), to_rows(logvar, side), strict=True)
        return [{"mean": mean, "logvar": logvar} for mean, logvar in rows]

    @staticmethod
    def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior; all three of one shape."""
        return mean + (0.5 * logvar).exp() * noise

    def decode(self, target: Tensor) -> Tensor:
        maps = self._maps(target)
        shift, scale = self._shift_and_scale(maps)
        return unit(self.model.decode((maps / scale + shift).to(self.model.dtype)).sample)

    def _shift_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of latents, broadcast over `[I, C, H, W]`."""
        if self.options.fit is not None:
            return self.shift.to(like), self.scale.to(like)
        mean, std = self.config["latents_mean"], self.config["latents_std"]
        shift = like.new_tensor(mean or [self.config["shift_factor"] or 0.0])
        scale = self.config["scaling_factor"] / like.new_tensor(std or [1.0])
        return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)


class VQTeacher(_Autoencoder):
    """Records `latents` `[N, C*p*p]`, codebook vectors packed as those of `autoencoder_kl`, and `codes` int64.

    `codes` `[N*p*p]` are the vectors' numbers, row by row of the grid of latents. `decode` takes the nearest codebook
    vectors of the rows; the gradient passes straight through.
    """

    Options = VQOptions
    model_class = VQModel

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        codes, vectors = self._nearest(self._latents(inputs).latents)
        rows = zip(to_rows(vectors, self.options.latents()), codes, strict=True)
        return [{"latents": latents, "codes": numbers} for latents, numbers in rows]

    def decode(self, target: Tensor) -> Tensor:
        maps, model = self._maps(target), self.model
        quantized = (maps + (self._nearest(maps)[1] - maps).detach()).to(model.dtype)
        spatial = quantized if self.config["norm_type"] == "spatial" else None
        return unit(model.decoder(model.post_quant_conv(quantized), spatial))

    def _nearest(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """`[I, C, H, W]` → the nearest codebook vectors' numbers `[I, H*W]`, and these vectors `[I, C, H, W]`."""
        book = full(self.model.quantize.embedding.weight)
        codes = torch.cdist(full(maps).permute(0, 2, 3, 1).flatten(0, 2), book).argmin(-1)
        return codes.view(len(maps), -1), book[codes].view(len(maps), *maps.shape[2:], -1).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _read_config(
    model_class: Any, source: str | None, subfolder: str, revision: str, given: str | None
) -> Mapping[str, Any]:
    """All fields of an autoencoder's config, defaults filled in: `given` (JSON), or else those of `source`."""
    wanted, where = model_class.__name__, "`config`" if source is None or given else _place(source, subfolder)
    try:
        if source is not None and given is None:
            given = Path(str(cached_file(source, "config.json", subfolder=subfolder, revision=revision))).read_text()
        fields = json.loads(str(given))
        if fields.get("_class_name", wanted) != wanted:
            raise ValueError(f"it is the config of {fields['_class_name']}")
        with torch.device("meta"):
            built = model_class(**{key: value for key, value in fields.items() if not key.startswith("_")})
        config = {key: value for key, value in built.config.items() if not key.startswith("_")}
        if (config["in_channels"], config["out_channels"]) != (3, 3) or not config["scaling_factor"] > 0:
            raise ValueError("in_channels and out_channels must be 3, and scaling_factor above 0")
    except Exception as error:  # errors of hub, network, parsing and diffusers have no common base
        raise ModelError(
            f"cannot make out the {wanted} of {where}. Check `pretrained`, `subfolder` and `config`; without network, "
            f"give a local folder, or a preset of registry.yaml or `config`, which carry the architecture. {error}"
        ) from error
    return config


def _build(model_class: Any, options: AutoencoderOptions, config: Mapping[str, Any]) -> Any:
    """The autoencoder; pretrained weights from safetensors only, and exactly those that `config` asks for."""
    if options.pretrained is None:
        if options.published is not None:
            raise ModelError(
                f"the weights of this teacher are not at hand. They are published as {options.published}: get that "
                "file, run `foveate import teacher FILE FOLDER`, and say `pretrained: FOLDER` beside the preset"
            )
        return model_class(**config)
    where = _place(options.pretrained, options.subfolder)
    try:
        model, report = model_class.from_pretrained(
            options.pretrained, subfolder=options.subfolder or None, revision=options.revision, use_safetensors=True,
            output_loading_info=True, torch_dtype=torch.float32, **config,
        )  # fmt: skip
    except Exception as error:  # errors of hub, files and shapes have no common base
        raise ModelError(
            f"cannot load the {model_class.__name__} of {where}: it takes a folder or repository of diffusers with "
            f"config.json and diffusion_pytorch_model.safetensors, and no other file of weights. {error}"
        ) from error
    if odd := sorted([*report["missing_keys"], *report["unexpected_keys"]]):
        raise ModelError(f"{where} and its config differ in {len(odd)} weights: {', '.join(odd[:8])} …")
    return model


def _place(source: str, subfolder: str) -> str:
    return f"'{source}'" + (f", subfolder '{subfolder}'" if subfolder else "")
