"""The fit of a KL autoencoder to the user's own pictures.

AdamW on the mean squared error of pixels in -1…1 plus `kl_weight` times the mean divergence of a latent number from
N(0, 1) (Kingma and Welling, arXiv 1312.6114, eq. 10), reconstructing from a draw of the posterior. Nothing perceptual
or adversarial: what is measured, PSNR, is what is trained. Every draw is from generators of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foveate.errors import DataError, ModelError
from foveate.objective import Moment, TeacherInputs
from foveate.options import Options
from foveate.teachers.patches import full, signed, unit

CHANNELS, LATENT_CHANNELS = (8, 16, 32), 4
TOKEN_PX = 16
"""Pixels a side of a visual token, where the fit makes the architecture: as of KL-16."""


class FitOptions(Options):
    """How a KL autoencoder is fitted to the pictures of the objective's first stage; and its size, if it has no other.

    The latents are then scaled to mean 0 and variance 1 over these pictures.
    """

    steps: int = Field(800, ge=0, description="Optimizer steps. 0: only measure the scale of the latents, and PSNR.")
    batch_size: int = Field(4, gt=0, description="Pictures a step.")
    learning_rate: float = Field(4e-3, gt=0, description="Of AdamW: warmed up in 5 % of the steps, then a cosine to 0.")
    kl_weight: float = Field(1e-3, ge=0, description="Of the KL divergence of a latent number, in nats.")
    crop: int | None = Field(
        128, gt=0, description="Side in pixels of the part of a picture that a step trains on, cut at the borders of "
        "visual tokens; null: whole pictures."
    )  # fmt: skip
    pictures: int = Field(2000, gt=1, description="Different pictures to take, at most; they are kept in memory.")
    held_out: int = Field(64, gt=0, description="Of these, how many measure and do not train; at most one in eight.")
    channels: tuple[int, ...] | None = Field(
        None, min_length=1, description="Widths of the levels; each further one halves the sides. For an autoencoder "
        f"without `config` and `pretrained`. Default: {', '.join(map(str, CHANNELS))}."
    )  # fmt: skip
    latent_channels: int | None = Field(
        None, gt=0, description=f"Numbers of a latent, in such an autoencoder. Default: {LATENT_CHANNELS}."
    )

    def architecture(self) -> dict[str, Any]:
        """A small autoencoder without attention, as fields of a diffusers config."""
        channels = list(self.channels or CHANNELS)
        common = math.gcd(*channels)
        groups = max(number for number in range(1, 33) if common % number == 0 and number <= max(1, common // 2))
        return {
            "block_out_channels": channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "latent_channels": self.latent_channels or LATENT_CHANNELS,
            "norm_num_groups": groups,
            "mid_block_add_attention": False,
        }

    def patch(self) -> int:
        """Latents a side of a visual token, so that it has 16 pixels, or more where the levels ask for it."""
        return max(1, TOKEN_PX >> (len(self.channels or CHANNELS) - 1))


def fit(
    model: Any, batches: Iterable[TeacherInputs], options: FitOptions, token_px: int, seed: int
) -> dict[str, float]:
    """Trains the AutoencoderKL `model` in place; tells PSNR (dB) on pictures held out, and its latents' mean and scale.

    `token_px`: pixels a side of a visual token. Raises `DataError` where there is but one picture, `ModelError` where
    the fit diverges.
    """
    pool = _different(batches, options.pictures)
    if len(pool) < 2:
        raise DataError("the fit of teacher autoencoder_kl needs two different pictures at least, and found one")
    held = max(1, min(options.held_out, len(pool) // 8))
    generator = torch.Generator().manual_seed(Moment(seed).seed_of("fit autoencoder_kl"))
    if options.steps:
        _train(model, pool[held:], options, token_px, generator)
    told = {**_latents(model, pool[held:]), "psnr_db": _psnr(model, pool[:held])}
    return {**told, "pictures": float(len(pool)), "held_out": float(held)}


def _different(batches: Iterable[TeacherInputs], limit: int) -> Tensor:
    """Up to `limit` pictures, none twice, `[n, 3, H, W]` uint8: until a whole round brings nothing new."""
    pool: dict[bytes, Tensor] = {}
    known = 0
    for inputs in batches:
        for views in inputs.prepared:
            pixels = views["pixels"].cpu()
            key = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
            known = known + 1 if key in pool else 0
            pool[key] = pixels
            if len(pool) == limit or known > 2 * len(pool) + TOKEN_PX:
                return torch.stack(list(pool.values()))
    return torch.stack(list(pool.values()))


def _train(model: Any, pool: Tensor, options: FitOptions, token_px: int, generator: torch.Generator) -> None:
    steps, warmup = options.steps, max(1, options.steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rate = min((step + 1) / warmup, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        drawn = pool[torch.randint(len(pool), (options.batch_size,), generator=generator)]
        pixels = signed(_cropped(drawn, options.crop, token_px, generator).to(model.device), model.dtype)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32).to(posterior.mean)
        made = model.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(made, pixels) + options.kl_weight * divergence
        if not loss.isfinite():
            raise ModelError(
                f"the fit of teacher autoencoder_kl diverged in step {step + 1}: lower `fit.learning_rate`, now "
                f"{options.learning_rate:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _cropped(pictures: Tensor, side: int | None, token_px: int, generator: torch.Generator) -> Tensor:
    """One part of every picture, all at the same place: whole visual tokens, `side` pixels or less."""
    if side is None:
        return pictures
    for axis in (2, 3):
        tokens, kept = pictures.shape[axis] // token_px, max(1, side // token_px)
        if kept < tokens:
            first = int(torch.randint(tokens - kept + 1, (), generator=generator))
            pictures = pictures.narrow(axis, first * token_px, kept * token_px)
    return pictures


@torch.no_grad()
def _latents(model: Any, pool: Tensor) -> dict[str, float]:
    """Mean, and 1 / standard deviation, of draws from the posteriors of up to 256 pictures; their divergence."""
    count, sums = 0, torch.zeros(3, dtype=torch.float64)
    for pixels in pool[:256].split(8):
        posterior = model.encode(signed(pixels.to(model.device), model.dtype)).latent_dist
        mean, logvar = posterior.mean.double().cpu(), posterior.logvar.double().cpu()
        second = mean.square() + logvar.exp()
        sums += torch.stack([mean.sum(), second.sum(), 0.5 * (second - 1 - logvar).sum()])
        count += mean.numel()
    mean, second, divergence = (sums / count).tolist()
    return {"shift_factor": mean, "scaling_factor": max(second - mean**2, 1e-12) ** -0.5, "kl": divergence}


@torch.no_grad()
def _psnr(model: Any, pool: Tensor) -> float:
    """Mean peak signal-to-noise ratio of reconstructions from the posterior's mean, in dB."""
    ratios = list[Tensor]()
    for pixels in pool.split(8):
        wanted = signed(pixels.to(model.device), model.dtype)
        made = model.decode(model.encode(wanted).latent_dist.mean).sample
        errors = (unit(made) - unit(wanted)).square().flatten(1).mean(1)
        ratios.append(-10 * full(errors).clamp_min(1e-12).log10())
    return float(torch.cat(ratios).mean())
