"""LDM's and LlamaGen's image tokenizers, written from what their papers and weights' names say.

An independent computation for the tests of `foveate import teacher`: names of weights are those of the published files.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """Two convolutions, each after norm and swish; a 1x1 convolution where the width changes."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = self.conv1(y * torch.sigmoid(y))
        y = self.norm2(y)
        y = self.conv2(y * torch.sigmoid(y))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all positions, queries, keys and values by 1x1 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(self.norm(x)).flatten(2) for part in (self.q, self.k, self.v))
        scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
        return x + self.proj_out(torch.einsum("bij,bcj->bci", scores.softmax(-1), v).view_as(x))


class Resample(nn.Module):
    """Half the side by a strided convolution padded right and below, or twice the side by repetition."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, 1 if up else 2, 1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.up else F.pad(x, (0, 1, 0, 1)))


def level(layout: str, blocks: int, before: int, after: int, attends: bool, moves: str | None) -> nn.Module:
    made = nn.Module()
    residuals = nn.ModuleList(Residual(after if number else before, after) for number in range(blocks))
    setattr(made, "res" if layout == "llamagen" else "block", residuals)
    made.attn = nn.ModuleList(Attention(after) for _ in range(blocks if attends else 0))
    if moves:
        setattr(made, moves, Resample(after, moves == "upsample"))
    return made


def run_level(module: Any, x: Tensor) -> Tensor:
    for number, block in enumerate(module.res if hasattr(module, "res") else module.block):
        x = block(x)
        x = module.attn[number](x) if len(module.attn) else x
    for moves in ("downsample", "upsample"):
        x = getattr(module, moves)(x) if hasattr(module, moves) else x
    return x


class Half(nn.Module):
    """An encoder or a decoder: levels with a pair of blocks and an attention in the middle of the network."""

    def __init__(self, layout: str, decodes: bool, widths: tuple[int, ...], blocks: int, attends: set[int], z: int):
        super().__init__()
        self.decodes, self.layout, last = decodes, layout, len(widths) - 1
        deep = widths[-1]
        self.conv_in = nn.Conv2d(z if decodes else 3, deep if decodes else widths[0], 3, padding=1)
        levels: dict[int, nn.Module] = {}
        before = deep if decodes else widths[0]
        for number in range(last, -1, -1) if decodes else range(last + 1):
            moves = ("upsample" if number else None) if decodes else ("downsample" if number < last else None)
            many = blocks + decodes
            levels[number] = level(layout, many, before, widths[number], number in attends, moves)
            before = widths[number]
        middle = [Residual(deep, deep), Attention(deep), Residual(deep, deep)]
        if layout == "llamagen":
            self.conv_blocks = nn.ModuleList(levels.values())  # in the order in which they run
            self.mid = nn.ModuleList(middle)
        else:
            setattr(self, "up" if decodes else "down", nn.ModuleList(levels[number] for number in range(last + 1)))
            self.mid = nn.Module()
            self.mid.block_1, self.mid.attn_1, self.mid.block_2 = middle
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, 3 if decodes else z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "llamagen":
            steps, middle = list(self.conv_blocks), list(self.mid)
        else:
            steps = list(self.up)[::-1] if self.decodes else list(self.down)
            middle = [self.mid.block_1, self.mid.attn_1, self.mid.block_2]
        x = self.conv_in(x)
        if self.decodes:
            for part in middle:
                x = part(x)
        for one in steps:
            x = run_level(one, x)
        if not self.decodes:
            for part in middle:
                x = part(x)
        x = self.norm_out(x)
        return self.conv_out(x * torch.sigmoid(x))


class Published(nn.Module):
    """KL: the encoder gives mean and log-variance. VQ (`codes` rows of `width` numbers): it gives what is quantised."""

    def __init__(
        self, layout: str, widths: tuple[int, ...], blocks: int, attends: set[int], z: int,
        codes: int = 0, width: int = 0,
    ):  # fmt: skip
        super().__init__()
        moments = z if codes else 2 * z
        self.encoder = Half(layout, False, widths, blocks, attends, moments)
        self.decoder = Half(layout, True, widths, blocks, attends, z)
        self.quant_conv = nn.Conv2d(moments, width or moments, 1)
        self.post_quant_conv = nn.Conv2d(width or z, z, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, width)
            if layout == "llamagen":
                self.quantize.register_buffer("codebook_used", torch.zeros(64))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def nearest_direction(self, latents: Tensor) -> Tensor:
        """LlamaGen's codes: the row whose direction is nearest to the latent's, `[I, H, W]`."""
        book = F.normalize(self.quantize.embedding.weight, dim=-1)
        return torch.einsum("bchw,kc->bhwk", F.normalize(latents, dim=1), book).argmax(-1)


def published(*arguments: Any, seed: int = 0, **options: Any) -> Published:
    """A tokenizer of random weights of everyday size, norms and biases too."""
    torch.manual_seed(seed)
    model = Published(*arguments, **options).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("weight"))
        elif parameter.ndim == 1:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
