"""The trainable heads of ROSS (J in the paper's equation 3), one for each way to reconstruct.

A head gives the sum of its loss over the visual tokens of a group of images, by the group's weights (0: a token does
not count), and reconstructs target rows for pictures. A token's error is a mean over channels, and over draws.

Shapes: I images of one grid, K draws of an image, N visual tokens, C width of a target row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import Grid, LossTerm
from foveate_ross.denoiser import DENOISERS
from foveate_ross.diffusion import Diffusion
from foveate_ross.groups import Group
from foveate_ross.options import TIMES, DenoisingOptions, HeadOptions, Measure

QUARTERS = 4
"""Parts of the timesteps that have a metric of their own."""


class Head(Protocol):
    """What the objectives ask of a head. `how`: what its reconstructions are, for people."""

    how: str

    def loss(self, group: Group) -> LossTerm:
        """The weighted sum over tokens, and metrics."""

    def reconstruct(self, group: Group) -> Tensor:
        """Target rows `[I, N, C]`, as the model sees them."""


class DenoisingHead(nn.Module):
    """ROSS-D (equation 4): mean squared error of the denoiser's prediction, `draws` times an image.

    Metrics `loss_t0` … `loss_t3`: the loss of draws in the first to last quarter of the timesteps, from
    least to most noise.
    """

    def __init__(self, options: DenoisingOptions, rows: int, llm_width: int, grid: Grid):
        super().__init__()
        given: Any = options
        self.draws, self.sampling = given.draws, given.sampling
        self.how = f"{given.sampling.sampler}, {given.sampling.steps} steps"
        self.denoiser = DENOISERS[given.denoiser.type](given.denoiser, rows, llm_width, grid)
        self.diffusion = Diffusion(given.schedule, given.prediction)

    def loss(self, group: Group) -> LossTerm:
        """See `Head`."""
        clean, (times_IK, noise_IKNC) = group.clean[:, None], self._draw(group)
        where = times_IK.to(clean.device)
        noisy_IKNC = self.diffusion.noisy(clean, noise_IKNC, where)
        made_IKNC = self.denoiser(noisy_IKNC, where, self.denoiser.condition(group.states), group.grid)
        errors_IKN = (made_IKNC - self.diffusion.goal(clean, noise_IKNC, where)).square().mean(-1)
        sums_IK = (errors_IKN * group.weights[:, None]).sum(-1)
        return LossTerm(sums_IK.sum() / self.draws, _by_time(sums_IK.detach(), times_IK, group.counts))

    def _draw(self, group: Group) -> tuple[Tensor, Tensor]:
        """Timesteps `[I, K]` (on the CPU) and noise `[I, K, N, C]`; each draw has a generator of its own."""
        times, noise = [], []
        for draw in range(self.draws):
            for one in group.generators(f"draw {draw}"):
                times.append(torch.randint(TIMES, (), generator=one))
                noise.append(torch.randn(group.target.shape[1:], generator=one))
        made = [torch.stack(parts).unflatten(0, (self.draws, -1)).transpose(0, 1) for parts in (times, noise)]
        return made[0], group.moved(made[1])

    def reconstruct(self, group: Group) -> Tensor:
        """Rows drawn by the sampler of the options; see `Head`."""
        condition, start = self.denoiser.condition(group.states), group.randn("sample", *group.target.shape[1:])

        def predict(rows_INC: Tensor, time: int) -> Tensor:
            times = torch.full((len(rows_INC), 1), time, device=rows_INC.device)
            made: Tensor = self.denoiser(rows_INC[:, None], times, condition, group.grid)
            return made[:, 0]

        return self.diffusion.sample(predict, start, group.generators("ancestral"), self.sampling)


class RegressionHead(nn.Module):
    """ROSS-R-Pixel and ROSS-R-Latent (section 4.1): an MLP on each state, against the target row.

    `cosine`: 1 - cos, and the paper's choice for latents (its figure 7 says MSE for KL-16: `measure: mse`). Metric
    `cosine`: the mean cosine of prediction and target.
    """

    def __init__(self, options: HeadOptions, measure: Measure, rows: int, llm_width: int):
        super().__init__()
        self.measure, self.how = measure, "regressed"
        self.mlp = mlp(options, rows, llm_width)

    def loss(self, group: Group) -> LossTerm:
        """See `Head`."""
        made = self.reconstruct(group)
        cosines_IN = F.cosine_similarity(made, group.clean, dim=-1)
        errors_IN = 1 - cosines_IN if self.measure == "cosine" else (made - group.clean).square().mean(-1)
        cosine = (cosines_IN.detach() * group.weights).sum(), sum(group.counts)
        return LossTerm((errors_IN * group.weights).sum(), {"cosine": cosine})

    def reconstruct(self, group: Group) -> Tensor:
        """The regressed rows."""
        made: Tensor = self.mlp(group.states)
        return made


class DecodingHead(nn.Module):
    """ROSS-R-Latent2Pixel (section 4.1): regressed latents through the teacher's decoder, which stays frozen.

    The error of a token is that of the pixels under it, in -1…1.
    """

    def __init__(self, options: HeadOptions, rows: int, llm_width: int):
        super().__init__()
        self.how = "regressed, decoded"
        self.mlp = mlp(options, rows, llm_width)

    def loss(self, group: Group) -> LossTerm:
        """See `Head`."""
        wanted = group.stack("pixels").to(group.states.dtype) / 255
        made = group.outputs.teacher.decode(self.reconstruct(group)).to(group.states.dtype)
        errors_I1HW = (2 * (made - wanted)).square().mean(1, keepdim=True)
        side = (wanted.shape[2] // group.grid[0], wanted.shape[3] // group.grid[1])
        errors_IN = F.avg_pool2d(errors_I1HW, side).flatten(1)
        return LossTerm((errors_IN * group.weights).sum())

    def reconstruct(self, group: Group) -> Tensor:
        """The regressed rows."""
        made: Tensor = self.mlp(group.states)
        return made


def _by_time(
    sums_IK: Tensor, times_IK: Tensor, counts: Sequence[float]
) -> dict[str, tuple[Tensor | float, float]]:
    """The sums of draws by the quarter of their timestep, and the tokens that were summed; `times_IK` on the CPU."""
    metrics: dict[str, tuple[Tensor | float, float]] = {}
    for quarter in range(QUARTERS):
        mine_IK = times_IK * QUARTERS // TIMES == quarter
        count = float(mine_IK.sum(-1).double() @ torch.tensor(counts, dtype=torch.float64))
        metrics[f"loss_t{quarter}"] = ((sums_IK * mine_IK.to(sums_IK)).sum(), count)
    return metrics


def mlp(options: HeadOptions, rows: int, llm_width: int) -> nn.Sequential:
    """From the LLM's states to target rows."""
    hidden = [options.width or llm_width] * (options.depth - 1)
    widths, layers = [llm_width, *hidden, rows], list[nn.Module]()
    for number, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.GELU()] * (number > 0) + [nn.Linear(before, after)]
    return nn.Sequential(*layers)
