"""What ROSS costs: a training step with it ÷ one without, and its denoiser ÷ a straightforward one, in one run.

    python benchmarks/ross.py                                        # shape small, one thread
    python benchmarks/ross.py --only denoiser --images 2 --width 512 --tokens 576
    python benchmarks/ross.py --only step --shape qwen2-1.5b --dtype bf16 --device cuda --batch 16
    python benchmarks/ross.py --shape tiny --rounds 2                # does the script itself work?

`step`: forward, backward and AdamW on the data set `digits`: without ROSS, with targets computed in the step, and with
targets that were computed before. `denoiser`: loss and gradients of the same formula, weights and noise; the
straightforward side repeats the states for each draw and does all with them as often. Sides take turns; a ratio is the
median of those of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from foveate import Moment, TeacherInputs, assemble, load_recipe
from foveate.targets import TeacherRoom
from foveate_ross.denoiser import DENOISERS, Denoiser
from foveate_ross.options import DenoiserOptions

BATCHES = 4
"""Different batches that a run goes through."""

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "encoder": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
                    "image_size": 28, "patch_size": 14},
        "llm": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                "intermediate_size": 64},
        "vae": {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
        "denoiser": {"depth": 1, "width": 32, "heads": 2},
    },
    "small": {
        "encoder": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768,
                    "image_size": 168, "patch_size": 14},
        "llm": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
                "intermediate_size": 2048},
        "vae": {"block_out_channels": [16, 32, 32, 32], "latent_channels": 16, "layers_per_block": 1,
                "norm_num_groups": 8},
        "denoiser": {"depth": 3, "width": 192, "heads": 6},
    },
    "qwen2-1.5b": {
        "encoder": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
                    "image_size": 384, "patch_size": 14},
        "llm": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True},
        "vae": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2},
        "denoiser": {"depth": 3, "width": 1024, "heads": 16},
    },
}  # fmt: skip
"""Encoder, LLM, an autoencoder of 8 px a latent (as FLUX's, packed 2×2), and denoiser."""


def recipe(args: argparse.Namespace, folder: Path) -> Path:
    """A stage of digits with `ross`, as a file."""
    shape = SHAPES[args.shape]
    blocks = len(shape["vae"]["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    vae = {**shape["vae"], **types, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    encoder = {"model_type": "siglip_vision_model", "vision_use_head": False, **shape["encoder"]}
    content = {
        "output": str(folder / "run"),
        "model": {"encoder": {"config": encoder}, "projector": {"type": "mlp", "depth": 2},
                  "llm": {"config": {"model_type": "qwen2", **shape["llm"]}}},
        "objectives": {"ross": {"teacher": {"type": "autoencoder_kl", "config": vae, "patch": 2},
                                "denoiser": {"type": args.type, **shape["denoiser"]}}},
        "stages": [{"name": "align", "data": [{"type": "digits", "task": "captions", "size": BATCHES * args.batch}],
                    "train": {"projector": 1e-3, "llm": 1e-4, "ross": 1e-3}, "batch_size": args.batch, "epochs": 1}],
        "precision": {"compute": args.dtype, "teachers": args.dtype},
        "hardware": {"workers": 0, "tokens_per_microbatch": 1 << 20},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


class Precomputed(TeacherRoom):
    """The same teachers, whose targets are computed once a picture."""

    def __init__(self, room: TeacherRoom) -> None:
        self.__dict__.update(vars(room))
        self.records: dict[Any, list[dict[str, Tensor]]] = {}

    def encode(self, name: str, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        key = name, tuple((record.sample_id, record.index) for record in inputs.records)
        if key not in self.records:
            self.records[key] = super().encode(name, inputs)
        return self.records[key]


def step(args: argparse.Namespace) -> None:
    """Steps with and without ROSS."""
    with tempfile.TemporaryDirectory() as folder:
        made = assemble(load_recipe(recipe(args, Path(folder))), args.device)
        batches = [step.batches[0].to(args.device) for step in made.data.stage(made.recipe.stages[0]).steps()]
    learner = made.learner.train()
    learner.lmm.encoder.eval().requires_grad_(False)
    if args.dtype == "bf16":
        learner.lmm.encoder.to(torch.bfloat16)
    computed, before = learner.teachers, Precomputed(learner.teachers)
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def side(active: list[str], teachers: TeacherRoom) -> Callable[[int], object]:
        def take(number: int) -> None:
            learner.teachers, batch = teachers, batches[number % BATCHES]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
                terms = learner(batch, Moment(step=number), active).terms
            rows = sum(record.tokens for record in batch.images)
            loss = terms["text"].total / len(batch.target_ids)
            sum((terms[name].total / rows for name in active), loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return take

    for number in range(BATCHES):  # the targets, once
        side(["ross"], before)(number)
    sides = {"without": side([], computed), "in the step": side(["ross"], computed), "before": side(["ross"], before)}
    seconds = turns(args, sides)
    lmm, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (learner.lmm, learner.objectives))
    print(f"step, shape {args.shape}, {args.dtype}: LMM of {lmm:.1f} M parameters, head of {head:.1f} M;", end=" ")
    print(f"{args.batch} images of {batches[0].images[0].tokens} tokens, {args.rounds} rounds")
    for name in ("in the step", "before"):
        print(f"  targets computed {name:11s}: {ratio(seconds[name], seconds['without']):.3f} × the step without ROSS")
    for name, spent in seconds.items():
        print(f"  {name:11s}: {args.batch / statistics.median(spent):.2f} images/s")
    if args.device == "cuda":
        for name, take in sides.items():
            torch.cuda.reset_peak_memory_stats()
            take(0)
            print(f"  {name:11s}: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most")


def denoiser(args: argparse.Namespace) -> None:
    """The denoiser beside a straightforward one."""
    side = int(args.tokens**0.5)
    grid, draws, rows = (side, args.tokens // side), 4, 64
    options = DenoiserOptions(type=args.type, depth=3, width=args.width, heads=None if args.type == "mlp" else 8)
    network = DENOISERS[args.type](options, rows, args.llm_width, grid).to(args.device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    states = torch.randn(args.images, args.tokens, args.llm_width, device=args.device, requires_grad=True)
    noisy = torch.randn(args.images, draws, args.tokens, rows, device=args.device)
    noise, times = torch.randn_like(noisy), torch.randint(1000, (args.images, draws), device=args.device)

    def ours() -> Tensor:
        return (network(noisy, times, network.condition(states), grid) - noise).square().mean()

    def plain() -> Tensor:
        repeated = states.repeat_interleave(draws, 0)
        made = straightforward(network, options, noisy.flatten(0, 1), times.flatten(), repeated)
        return (made - noise.flatten(0, 1)).square().mean()

    found = []
    for loss in (ours, plain):  # the same formula
        network.zero_grad()
        states.grad = None
        loss().backward()
        found.append([states.grad.clone(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])  # type: ignore[union-attr]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4 * float(first.abs().max()), rtol=1e-3)

    def side_of(loss: Callable[[], Tensor]) -> Callable[[int], object]:
        return lambda number: loss().backward()

    seconds = turns(args, {"ours": side_of(ours), "plain": side_of(plain)})
    print(f"denoiser {args.type} of width {args.width}, {args.images} images of {args.tokens} tokens,", end=" ")
    print(f"LLM of width {args.llm_width}: straightforward ÷ ours {ratio(seconds['plain'], seconds['ours']):.3f}")


def straightforward(
    network: Denoiser, options: DenoiserOptions, noisy: Tensor, times: Tensor, states: Tensor
) -> Tensor:
    """The same prediction for rows `[B, N, C]`: everything once a draw, one linear map a layer."""
    w: dict[str, Tensor] = dict(network.named_parameters())
    width, table = options.width, network.positions.to(noisy)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, f"{name}.qkv").unflatten(-1, (3, options.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[arg-type]
        return linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.out")

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.0"), approximate="tanh"), f"{name}.2")

    states = F.layer_norm(states, states.shape[-1:], eps=1e-5)
    moment = linear(F.silu(linear(network.clock[times].to(noisy), "time.0")), "time.2")[:, None]
    if options.type == "vit":
        x = table.expand(len(noisy), -1, -1)
        for name in (f"blocks.{number}" for number in range(options.depth)):
            x = x + linear(states, f"{name}.condition") + linear(F.silu(moment), f"{name}.time")
            x = x + linear(noisy, f"{name}.noisy")
            normed = F.layer_norm(x, (width,), w[f"{name}.norms.0.weight"], w[f"{name}.norms.0.bias"], 1e-6)
            x = x + attention(normed, f"{name}.attention")
            normed = F.layer_norm(x, (width,), w[f"{name}.norms.1.weight"], w[f"{name}.norms.1.bias"], 1e-6)
            x = x + mlp(normed, f"{name}.mlp")
        return linear(F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], 1e-6), "exit")
    x, c = linear(noisy, "enter") + table, moment + linear(F.silu(states), "state")
    for name in (f"blocks.{number}" for number in range(options.depth)):
        parts = linear(F.silu(c), f"{name}.modulation").split(width, -1)
        if options.type == "dit":
            x = x + parts[2] * attention(modulated(x, *parts[:2]), f"{name}.attention")
        x = x + parts[-1] * mlp(modulated(x, *parts[-3:-1]), f"{name}.mlp")
    return linear(modulated(x, *linear(F.silu(c), "modulation").chunk(2, -1)), "exit")


def turns(args: argparse.Namespace, sides: Mapping[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, take in sides.items():
            started = time.perf_counter()
            take(number)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: spent[1:] for name, spent in seconds.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds."""
    return statistics.median(first / second for first, second in zip(above, below, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["step", "denoiser"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--type", choices=DENOISERS, default="dit")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    numbers = {"batch": 4, "rounds": 7, "images": 2, "tokens": 144, "width": 256, "llm-width": 1024}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.only != "denoiser":
        step(given)
    if given.only != "step":
        denoiser(given)
