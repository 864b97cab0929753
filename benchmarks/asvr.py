"""The head of ASVR beside a straightforward one, and its targets with and without a second encoder pass: ratios.

    python benchmarks/asvr.py [--tokens 729 2916] [--precision fp32 bf16] [--threads 1]
                              [--sides straightforward foveate] [--width 2048 --codes 16384 …]
    python benchmarks/asvr.py --targets

The head: state projector, depth transformer and classifiers, forward and backward, with random states and codes; all
sides have the same weights. Each runs in a process of its own.

- `straightforward`: tokens before depths, feed-forwards and classifiers as `einsum` over weights of all depths, all
  logits at once, autograd as it comes.
- `released`: the same with gradient checkpointing of each layer, as in the released code.
- `foveate`: the plugin's. It keeps the input and the first product of each block, computes the rest once more in the
  backward, sees the logits of one depth at a time, and takes many tokens chunk by chunk.
- `torch_products`: the plugin's, but for its products in fp32 on a CPU, which are torch's default ones (MKL) in place
  of oneDNN's. What is left of the ratio does not come from the choice of a library.

Time is that of the process on its CPU, so that other processes count little. Memory is the peak of the resident set
over what was there before: once where gradients begin as None, so that those that all sides leave count, and once
where they are there already, as in all micro-batches of a step but the first.

The targets: encoding a batch's pictures for the LLM and for residual codes, by one pass or by two.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "plugins")]
SIDES = ("straightforward", "released", "torch_products", "foveate")


def resident() -> float:
    """Megabytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Peak:
    """The largest resident set inside of a `with` block, looked at fifty times a second.

    What the C library holds of freed memory goes back to the system first: else it would be free of charge.
    """

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self.most = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, resident())


def straightforward(head: Any, states: Any, codes: Any, quantizer: Any, half: bool, released: bool = False) -> Any:
    """The same loss with all logits at once; tokens first, then depths. `released`: layers are checkpointed."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    def through(layer: Any, x_RQE: Any) -> Any:
        rows, depth, width = x_RQE.shape
        qkv = layer.qkv(layer.attention_norm(x_RQE)).view(rows, depth, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x_RQE = x_RQE + layer.out(mixed.transpose(1, 2).reshape(rows, depth, width))
        inner = F.gelu(torch.einsum("rqe,qef->rqf", layer.ffn_norm(x_RQE), layer.up.weight))
        return x_RQE + torch.einsum("rqf,qfe->rqe", inner, layer.down.weight)

    sums = quantizer.partial_sums(codes[:, :-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        x_RQE = torch.cat([head.projector(states)[:, None], head.vectors(sums).transpose(0, 1)], 1)
        for layer in head.layers:
            x_RQE = checkpoint(through, layer, x_RQE, use_reentrant=False) if released else through(layer, x_RQE)
        weights = torch.stack([classifier.weight for classifier in head.classifiers])
        logits_RQK = torch.einsum("rqe,qke->rqk", head.norm(x_RQE), weights)
        return F.cross_entropy(logits_RQK.flatten(0, 1).float(), codes.flatten(), reduction="sum") / codes.shape[1]


def one_side(case: dict[str, Any]) -> dict[str, float]:
    """Loss, seconds of the CPU, and peaks of memory in megabytes of one side, in this process."""
    import torch

    from foveate_asvr import blocks
    from foveate_asvr.head import DepthHeadOptions, make_head
    from foveate_asvr.loss import code_losses
    from foveate_asvr.quantizer import ResidualQuantizer

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    options = DepthHeadOptions(width=case["width"], heads=case["heads"], layers=case["layers"])
    head = make_head(options, case["states"], case["vectors"], case["depth"], case["codes"])
    quantizer = ResidualQuantizer(case["depth"], case["codes"], case["vectors"])
    quantizer.codebooks.normal_()
    codes = torch.randint(case["codes"], (case["tokens"], case["depth"]))
    states = torch.randn(case["tokens"], case["states"], requires_grad=True)
    half, weights = case["precision"] == "bf16", torch.full((case["depth"],), 1 / case["depth"])
    blocks.ONEDNN = blocks.ONEDNN and case["side"] == "foveate"
    told: dict[str, float] = {}
    for name in ("first", "later"):
        with Peak() as peak:
            started = time.process_time()
            if case["side"] in ("foveate", "torch_products"):
                loss = code_losses(head, states, codes, quantizer, weights, half, case["chunk"]).total
            else:
                loss = straightforward(head, states, codes, quantizer, half, case["side"] == "released")
            loss.backward()
            told[f"seconds_{name}"] = time.process_time() - started
        told[f"megabytes_{name}"] = peak.most - peak.before
        told["loss"] = float(loss.detach())
        del loss
    return told


def compare_heads(case: dict[str, Any], sides: list[str]) -> None:
    """The sides in turn, and how often the last one's time and memory are in those of the others."""
    found = {}
    for side in sides:
        command = [sys.executable, __file__, "--one", json.dumps({**case, "side": side})]
        found[side] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        told = ", ".join(f"{key} {value:,.1f}" for key, value in found[side].items())
        print(f"  {side:16s} {told}", flush=True)
    for side in sides[:-1]:
        ratio = {key: found[side][key] / max(found[sides[-1]][key], 1e-9) for key in found[side]}
        print(f"  {side} over {sides[-1]}:", end="")
        for name, what in (("first", "where gradients are new"), ("later", "where they are there")):
            print(f" {what} time {ratio[f'seconds_{name}']:.2f}x, memory {ratio[f'megabytes_{name}']:.2f}x;", end="")
        print(f" mean time {statistics.mean([ratio['seconds_first'], ratio['seconds_later']]):.2f}x", flush=True)


def compare_targets(images: int, threads: int, rounds: int = 5) -> None:
    """Seconds for the LLM's features and residual codes of a batch, the encoder running once or twice."""
    import torch

    from foveate.model.encoder import TransformersEncoder, TransformersEncoderOptions
    from foveate.model.lmm import encode
    from foveate_asvr.quantizer import ResidualQuantizer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = {
        "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "vision_use_head": False,
    }  # fmt: skip
    encoder = TransformersEncoder(TransformersEncoderOptions.model_validate({"config": config, "layer": -1})).eval()
    encoder.requires_grad_(False)
    pixels, quantizer = torch.randn(images, 3, 224, 224), ResidualQuantizer(8, 1024, 768)
    quantizer.codebooks.normal_()
    spent: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for reuse, times in spent.items():
            started = time.process_time()
            with torch.no_grad():
                states = encode(encoder, pixels, {11})[11]
                features = states if reuse else encode(encoder, pixels, {11})[11]
                quantizer.encode(features.flatten(0, 1))
            times.append(time.process_time() - started)
    one, two = (statistics.median(spent[reuse]) for reuse in (True, False))
    what = f"targets of {images} images (SigLIP base, 8 x 1,024 codes)"
    print(f"{what}: one pass {one:.2f} s, two {two:.2f} s, {two / one:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"states": 4096, "vectors": 1152, "width": 2048, "heads": 16, "layers": 3, "depth": 8, "codes": 16384}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[729])
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument("--chunk", type=int, help="tokens of a chunk of ours; default: what it chooses")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=["straightforward", "foveate"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--targets", action="store_true", help="only the targets")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one_side(json.loads(given.one))))
        return
    for tokens in [] if given.targets else given.tokens:
        for precision in given.precision:
            case = {name: getattr(given, name) for name in (*sizes, "threads", "chunk")}
            print(f"{tokens} tokens x {given.depth} depths x {given.codes:,} codes, {precision}:", flush=True)
            compare_heads({**case, "tokens": tokens, "precision": precision}, given.sides)
    compare_targets(8, given.threads)


if __name__ == "__main__":
    main()
