"""ROSS written down once more, in float64: one image, one draw, one token after the other, from the formulas alone.

Nothing of the plugin is called: weights come from the head's state by name, noise from the contract's generators.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from foveate.plugins import installed_plugins
from foveate.registry import load_registry, resolve
from foveate.testing.models import Chosen

KL = {
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 3, "norm_num_groups": 4,
    "scaling_factor": 0.7, "shift_factor": 0.1,
}  # fmt: skip
VQ = {
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 3, "norm_num_groups": 4,
    "num_vq_embeddings": 17, "vq_embed_dim": 3,
}  # fmt: skip
TEACHERS: dict[str, dict[str, Any]] = {
    "kl": {"type": "autoencoder_kl", "config": KL},
    "flux": {"type": "autoencoder_kl", "config": KL, "patch": 2},
    "vq": {"type": "vq", "config": VQ},
    "features": {"type": "features", "normalize": "layer"},
    "raw": {"type": "patches", "patch_px": 4},
    "patches": {"type": "patches", "patch_px": 4, "normalize": True},
}
SMALL = {"width": 16, "depth": 2, "heads": 2}
"""A denoiser's size."""


@functools.cache
def _context() -> dict[str, Any]:
    return {"plugins": installed_plugins(), "registry": load_registry()[0]}


def chosen(options: dict[str, Any], name: str = "ross") -> Chosen:
    """The objective `name` with its options, checked as a recipe's."""
    found = resolve("objectives", {"type": name, **options}, _context())
    checked: Any = found.options
    return Chosen(name, found.cls, checked)


def small(kind: str) -> dict[str, Any]:
    """A small denoiser of a type."""
    return {"type": kind, **{key: value for key, value in SMALL.items() if (kind, key) != ("mlp", "heads")}}


def spread(module: torch.nn.Module, seed: int) -> None:
    """Weights of everyday size, none of them zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.copy_(noise / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 3))


def kept(schedule: str) -> list[float]:
    """The share of a target's variance that is left at each timestep: the product of 1 - beta."""
    shares, share = [], 1.0
    for time in range(1000):
        if schedule == "linear":
            beta = 1e-4 + (2e-2 - 1e-4) * time / 999
        else:
            now, then = (math.cos(math.pi / 2 * (x / 1000 + 0.008) / 1.008) ** 2 for x in (time, time + 1))
            beta = min(0.999, 1 - then / now)
        share *= 1 - beta
        shares.append(share)
    return shares


def loss(objective: Any, outputs: Any, targets: Any, tokens: list[list[bool]] | None = None) -> float:
    """The sum over tokens (those that `tokens` has, image by image) of the variant's error."""
    options, total = objective.options, 0.0
    states = outputs.states().detach()
    weights = {name.removeprefix("head."): value.detach() for name, value in objective.named_parameters()}
    for number, image in enumerate(outputs.images):
        record, rows = targets[number], states[image.rows.start : image.rows.stop].double()
        clean = next(iter(record.values())).double()
        if "logvar" in record:
            noise = torch.randn(clean.shape, generator=outputs.generator(number, "posterior")).double()
            clean = clean + record["logvar"].double().exp().sqrt() * noise
        if options.variant == "denoise":
            errors = denoising(objective, outputs, number, rows, clean, weights)
        elif options.variant == "regress_latents_to_pixels":
            errors = decoded(outputs.teacher, mlp(rows, weights, "mlp"), record["pixels"], image.record.grid)
        elif options.measure == "cosine":
            errors = [1 - cosine(made, row) for made, row in zip(mlp(rows, weights, "mlp"), clean, strict=True)]
        else:
            differences = mlp(rows, weights, "mlp") - clean
            errors = [float(one @ one) / len(one) for one in differences]
        chosen = tokens[number] if tokens else [True] * len(errors)
        total += sum(error for error, counts in zip(errors, chosen, strict=True) if counts)
    return total


def denoising(objective: Any, outputs: Any, number: int, rows: Tensor, clean: Tensor, weights: Any) -> list[float]:
    """A token's error: the mean over draws and channels."""
    options, errors = objective.options, [0.0] * len(rows)
    shares = kept(options.schedule)
    for draw in range(options.draws):
        generator = outputs.generator(number, f"draw {draw}")
        time = int(torch.randint(1000, (), generator=generator))
        noise = torch.randn(clean.shape, generator=generator).double()
        signal, sigma = math.sqrt(shares[time]), math.sqrt(1 - shares[time])
        noisy = signal * clean + sigma * noise
        made = denoised(options.denoiser, rows, noisy, time, outputs.images[number].record.grid, weights)
        wanted = {"epsilon": noise, "x0": clean, "v": signal * noise - sigma * clean}[options.prediction]
        for token, difference in enumerate(made - wanted):
            errors[token] += float(difference @ difference) / len(difference) / options.draws
    return errors


def denoised(options: Any, rows: Tensor, noisy: Tensor, time: int, grid: tuple[int, int], weights: Any) -> Tensor:
    """One draw of one image through the denoiser, layer by layer, each with a modulation of its own."""
    width, w = options.width, {name.removeprefix("denoiser."): value for name, value in weights.items()}
    places, states = torch.tensor(places_of(grid, width), dtype=torch.float64), normed(rows, 1e-5)
    clock = [f(time * 10_000 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)]
    moment = linear(silu(linear(torch.tensor(clock, dtype=torch.float64), w, "time.0")), w, "time.2")
    if options.type == "vit":
        x = places
        for block in (f"blocks.{number}" for number in range(options.depth)):
            x = x + linear(states, w, f"{block}.condition")
            x = x + linear(noisy, w, f"{block}.noisy") + linear(silu(moment), w, f"{block}.time")
            x = x + attention(affine(x, w, f"{block}.norms.0"), w, f"{block}.attention", options.heads)
            x = x + hidden(affine(x, w, f"{block}.norms.1"), w, f"{block}.mlp")
        return linear(affine(x, w, "norm"), w, "exit")
    x = linear(noisy, w, "enter") + places
    c = silu(moment + linear(silu(states), w, "state"))
    for block in (f"blocks.{number}" for number in range(options.depth)):
        if options.type == "dit":
            shift, scale, gate = linear(c, w, f"{block}.modulation")[:, : 3 * width].chunk(3, -1)
            inner = attention(normed(x, 1e-6) * (1 + scale) + shift, w, f"{block}.attention", options.heads)
            x = x + gate * inner
        shift, scale, gate = linear(c, w, f"{block}.modulation")[:, -3 * width :].chunk(3, -1)
        x = x + gate * hidden(normed(x, 1e-6) * (1 + scale) + shift, w, f"{block}.mlp")
    shift, scale = linear(c, w, "modulation").chunk(2, -1)
    return linear(normed(x, 1e-6) * (1 + scale) + shift, w, "exit")


def places_of(grid: tuple[int, int], width: int) -> list[list[float]]:
    """For each token sines and cosines of its column, then of its row."""
    waves = [10_000 ** (-i / (width // 4)) for i in range(width // 4)]
    table = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            table.append([f(at * wave) for at in (column, row) for f in (math.sin, math.cos) for wave in waves])
    return table


def attention(x: Tensor, w: Any, name: str, heads: int) -> Tensor:
    query, key, value = linear(x, w, f"{name}.qkv").chunk(3, -1)
    side, seen = x.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * side, (head + 1) * side)
        scores = query[:, part] @ key[:, part].T / math.sqrt(side)
        scores = (scores - scores.max(-1, keepdim=True).values).exp()
        seen.append(scores / scores.sum(-1, keepdim=True) @ value[:, part])
    return linear(torch.cat(seen, -1), w, f"{name}.out")


def hidden(x: Tensor, w: Any, name: str) -> Tensor:
    inner = linear(x, w, f"{name}.0")
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return linear(inner, w, f"{name}.2")


def mlp(x: Tensor, w: Any, name: str) -> Tensor:
    """Linear layers with the exact GELU between them."""
    layers = sorted(int(key.split(".")[1]) for key in w if key.startswith(name) and key.endswith("weight"))
    for layer in layers:
        x = x if layer == 0 else 0.5 * x * (1 + torch.special.erf(x / math.sqrt(2)))
        x = linear(x, w, f"{name}.{layer}")
    return x


def linear(x: Tensor, w: Any, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def normed(x: Tensor, epsilon: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def affine(x: Tensor, w: Any, name: str) -> Tensor:
    return normed(x, 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second) / math.sqrt(float(first @ first) * float(second @ second))


def decoded(teacher: Any, rows: Tensor, pixels: Tensor, grid: tuple[int, int]) -> list[float]:
    """A token's error in pixels of -1…1, by diffusers' own decoder."""
    model, side = teacher.model, int((rows.shape[1] // 3) ** 0.5)
    maps = torch.zeros(1, 3, grid[0] * side, grid[1] * side, dtype=torch.float64)
    for token, row in enumerate(rows):
        down, across = divmod(token, grid[1])
        maps[0, :, down * side : (down + 1) * side, across * side : (across + 1) * side] = row.reshape(3, side, side)
    if hasattr(model, "quantize"):
        book = model.quantize.embedding.weight
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                nearest = int((book - maps[0, :, y, x]).square().sum(1).argmin())
                maps[0, :, y, x] = book[nearest]
        made = model.decode(maps, force_not_quantize=True).sample[0]
    else:
        made = model.decode(maps / 0.7 + 0.1).sample[0]
    difference = (made.clamp(-1, 1) - (pixels.double() / 255 * 2 - 1)).square()
    p = difference.shape[1] // grid[0]
    tokens = [(y * p, x * p) for y in range(grid[0]) for x in range(grid[1])]
    return [float(difference[:, y : y + p, x : x + p].mean()) for y, x in tokens]
