"""What a recipe can tell ROSS. What does not fit its variant is an error at its line."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from foveate import ObjectiveOptions, Options, Teacher, TeacherChoice

Variant = Literal["denoise", "regress_pixels", "regress_latents", "regress_latents_to_pixels"]
Measure = Literal["mse", "cosine"]
Schedule = Literal["cosine", "linear"]
Prediction = Literal["epsilon", "v", "x0"]
Sampler = Literal["ddim", "ddpm"]

TIMES = 1000
"""Timesteps of the diffusion, numbered from 0 (least noise)."""

MEASURES: dict[str, tuple[Measure, ...]] = {
    "denoise": ("mse",),
    "regress_pixels": ("mse",),
    "regress_latents": ("cosine", "mse"),
    "regress_latents_to_pixels": ("mse",),
}
"""What a variant can be measured by; the first is its default, the paper's."""


class DenoiserOptions(Options):
    """The denoiser's architecture. Default: that of the release."""

    model_config = ConfigDict(validate_default=True)

    type: Literal["dit", "vit", "mlp"] = Field(
        "dit", description="`dit`: adaLN-Zero, a condition for each token (the release); `vit`: blocks with three "
        "projections (the paper); `mlp`: dit without attention (the paper's ablation)."
    )  # fmt: skip
    depth: int = Field(3, gt=0, description="Blocks.")
    width: int = Field(1024, gt=0, multiple_of=4, description="Channels, a multiple of 4.")
    heads: int | None = Field(None, gt=0, description="Heads of the attention. Default: 16; `mlp` has none.")

    @field_validator("heads")
    @classmethod
    def _fits(cls, heads: int | None, info: ValidationInfo) -> int | None:
        width = info.data.get("width")
        if info.data.get("type") == "mlp":
            if heads is not None:
                raise ValueError("`type: mlp` has no attention: leave `heads` out")
            return None
        heads = heads or 16
        if width is not None and width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        return heads


class HeadOptions(Options):
    """The MLP of the variants that regress: linear layers with GELU between them."""

    depth: int = Field(2, gt=0, description="Linear layers; 1: a linear map.")
    width: int | None = Field(None, gt=0, description="Width of hidden layers. Default: the LLM's.")


class SamplingOptions(Options):
    """How pictures are drawn; training does not use it."""

    sampler: Sampler = Field("ddim", description="`ddim`: deterministic; `ddpm`: ancestral, as in the release.")
    steps: int = Field(50, gt=0, le=TIMES, description="Of the sampler. The release takes 1000 of ddpm.")


class DenoisingOptions(ObjectiveOptions):
    """What all that denoises shares."""

    teacher: TeacherChoice = Field(
        description="Frozen maker of targets: autoencoder_kl, vq, features, patches, a preset or a plugin's."
    )
    mask_padding: bool = Field(
        False, description="Visual tokens in padding do not count. The paper and the release reconstruct them too."
    )
    denoiser: DenoiserOptions | None = Field(None, description="The network. Default: `{type: dit}`.")
    schedule: Schedule | None = Field(None, description="Of the noise. Default: cosine.")
    prediction: Prediction | None = Field(
        None, description="What the denoiser predicts: the noise, v, or the clean target. Default: epsilon."
    )
    draws: int | None = Field(None, gt=0, description="Timesteps, each with its noise, of an image. Default: 4.")
    sampling: SamplingOptions | None = Field(None, description="Of pictures. Default: ddim, 50 steps.")

    @field_validator("denoiser", "schedule", "prediction", "draws", "sampling")
    @classmethod
    def _of_denoising(cls, value: Any, info: ValidationInfo) -> Any:
        variant = info.data.get("variant", "denoise")
        if variant != "denoise":
            if value is not None:
                raise ValueError(f"is for `variant: denoise`, not for {variant}: leave it out")
            return None
        defaults = {
            "denoiser": DenoiserOptions(), "schedule": "cosine", "prediction": "epsilon", "draws": 4,
            "sampling": SamplingOptions(),
        }  # fmt: skip
        return defaults[str(info.field_name)] if value is None else value


class _VariantOptions(ObjectiveOptions):
    """What the others depend on, and so comes first."""

    variant: Variant = Field(
        "denoise", description="What is reconstructed and how, in the paper's names: ROSS-D, ROSS-R-Pixel, "
        "ROSS-R-Latent, ROSS-R-Latent2Pixel."
    )  # fmt: skip
    measure: Measure | None = Field(
        None, description="`regress_latents` takes both, the others only mse. Default: cosine for regress_latents."
    )

    @field_validator("measure")
    @classmethod
    def _measures(cls, measure: Measure | None, info: ValidationInfo) -> Measure | None:
        variant = info.data.get("variant")
        if variant is None:
            return measure
        if measure is not None and measure not in MEASURES[variant]:
            raise ValueError(f"{measure} is for `variant: regress_latents`; {variant} is measured by mse")
        return measure or MEASURES[variant][0]


class RossOptions(DenoisingOptions, _VariantOptions):
    """Options of `ross`."""

    head: HeadOptions | None = Field(
        None, description="The MLP of the variants that regress. Default: two layers as wide as the LLM."
    )
    loss_on: Literal["all", "unedited", "edited"] = Field(
        "all", description="Where an editor such as ViCToR changes visual tokens: the tokens that the loss looks at. "
        "Their mean stands for all tokens of the image."
    )  # fmt: skip

    @field_validator("teacher")
    @classmethod
    def _teaches(cls, teacher: Any, info: ValidationInfo) -> Any:
        variant, patches = info.data.get("variant"), teacher.type == "patches"
        if variant == "regress_pixels" and not patches:
            raise ValueError("`variant: regress_pixels` needs the teacher `patches`")
        if variant in ("regress_latents", "regress_latents_to_pixels") and patches:
            raise ValueError(f"`variant: {variant}` needs a teacher of latents; that of patches is regress_pixels")
        if variant == "regress_latents_to_pixels" and teacher.cls.decode is Teacher.decode:
            raise ValueError(f"`variant: {variant}` needs a teacher with a decoder, which {teacher.type} lacks")
        return teacher

    @field_validator("head")
    @classmethod
    def _of_regression(cls, head: HeadOptions | None, info: ValidationInfo) -> HeadOptions | None:
        if info.data.get("variant") == "denoise":
            if head is not None:
                raise ValueError("is for the variants that regress; that of `denoise` is `denoiser`")
            return None
        return head or HeadOptions()


class GenerativeOptions(DenoisingOptions):
    """Options of `ross_generative`."""

    query_grid: tuple[int, int] | None = Field(
        None, description="Rows and columns of the learned query tokens of an image; their states are interpolated to "
        "the grid of the targets. Default: that grid, the visual tokens' (the paper)."
    )  # fmt: skip

    @field_validator("query_grid")
    @classmethod
    def _positive(cls, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        if grid is not None and min(grid) < 1:
            raise ValueError("must have at least one row and one column")
        return grid
