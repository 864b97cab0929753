"""The diffusion of ROSS: how targets get noisy, what is to be predicted, and how a target is drawn from noise.

Equations of the paper's appendix A; z0 is the clean target, e the noise, a_t the product of 1 - beta up to t.

Shapes: I images, K draws of an image, N visual tokens, C width of a target row, T = 1000 timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from foveate_ross.options import TIMES, Prediction, SamplingOptions, Schedule

_DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


class Diffusion(nn.Module):
    """z_t = sqrt(a_t) z0 + sqrt(1 - a_t) e (equation 6). Its factors are exact: made in float64, never trained."""

    signal: Tensor
    sigma: Tensor

    def __init__(self, schedule: Schedule, prediction: Prediction):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        clean = (1 - torch.tensor(betas(schedule), dtype=torch.float64)).cumprod(0)
        self.register_buffer("signal", clean.sqrt(), persistent=False)
        self.register_buffer("sigma", (1 - clean).sqrt(), persistent=False)

    def noisy(self, clean: Tensor, noise_IKNC: Tensor, times_IK: Tensor) -> Tensor:
        """z_t, `[I, K, N, C]`; `clean` `[I, 1, N, C]`."""
        signal, sigma = self._factors(times_IK, clean)
        return signal * clean + sigma * noise_IKNC

    def goal(self, clean: Tensor, noise_IKNC: Tensor, times_IK: Tensor) -> Tensor:
        """What the denoiser is to predict, of the same shape: e, z0, or v = sqrt(a_t) e - sqrt(1 - a_t) z0."""
        if self.prediction == "v":
            signal, sigma = self._factors(times_IK, clean)
            return signal * noise_IKNC - sigma * clean
        return noise_IKNC if self.prediction == "epsilon" else clean

    def _factors(self, times_IK: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), `[I, K, 1, 1]`."""
        signal, sigma = (table[times_IK][..., None, None].to(like.dtype) for table in (self.signal, self.sigma))
        return signal, sigma

    def sample(
        self, predict: Callable[[Tensor, int], Tensor], noise_INC: Tensor, generators: Sequence[torch.Generator],
        options: SamplingOptions,
    ) -> Tensor:  # fmt: skip
        """A target `[I, N, C]` drawn from noise, by `predict(rows at a timestep, the timestep)`.

        `ddim` is deterministic (eta 0); `ddpm` ancestral (equation 7) with the larger of the two usual variances, each
        image's noise from its own generator. Latents are not clipped.
        """
        common = {
            "num_train_timesteps": TIMES, "trained_betas": betas(self.schedule), "clip_sample": False,
            "prediction_type": _DIFFUSERS[self.prediction], "timestep_spacing": "leading",
        }  # fmt: skip
        ancestral = options.sampler == "ddpm"
        scheduler: Any = DDPMScheduler(**common, variance_type="fixed_large") if ancestral else DDIMScheduler(**common)
        scheduler.set_timesteps(options.steps)
        given, rows = {"generator": list(generators)} if ancestral else {}, noise_INC
        for time in scheduler.timesteps.tolist():
            rows = scheduler.step(predict(rows, time), time, rows, **given).prev_sample
        return rows


def betas(schedule: Schedule) -> list[float]:
    """The variances of the noise added at each of the 1000 timesteps.

    `cosine` (arXiv 2102.09672, equation 17): s = 0.008, at most 0.999. `linear` (arXiv 2006.11239): 1e-4 to 0.02.
    """
    if schedule == "linear":
        return [1e-4 + (0.02 - 1e-4) * time / (TIMES - 1) for time in range(TIMES)]
    left = [math.cos((time / TIMES + 0.008) / 1.008 * math.pi / 2) ** 2 for time in range(TIMES + 1)]
    return [min(1 - after / before, 0.999) for before, after in pairwise(left)]
