"""A training step of foveate beside one of stock transformers: time, peak memory and loss, as ratios of one run.

    python benchmarks/step.py --vocab 32000 151936 --batch 4 16 --dtype fp32 bf16 --allocator tuned untuned

One side is foveate: samples packed into one row, `Learner`, the loss over supervised positions only. The other is
transformers' `LlavaForConditionalGeneration` with the same weights and samples, right-padded to the longest, and its
own loss (`labels=`). Each side lives in a process of its own; the two take turns, pair after pair, so that whatever
else the machine does meets both. What exactly is measured stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGE_TOKENS, IMAGE_SIZE, PATCH = 576, 336, 14
BATCHES = 4
"""Different batches that a run goes through; their lengths are drawn anew for each."""

SHAPES: dict[str, dict[str, Any]] = {
    "512x8": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
              "intermediate_size": 2048},
    "qwen2-0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                   "intermediate_size": 4864, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128},
}  # fmt: skip

ALLOCATORS: dict[str, dict[str, str]] = {
    "untuned": {},
    # glibc keeps what it once got, in huge pages: freed logits do not go back to the kernel to be faulted in again
    "tuned": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 26),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
}
TARGETS = {32000: 1.6, 151936: 2.4}
"""Times faster that shape 512x8 has to be on a CPU with the tuned allocator, by vocabulary."""


def draw_samples(case: dict[str, Any], number: int) -> list[Any]:
    """Samples of one picture and LLaVA-like text: prompts of 10 to 60 tokens, answers around 60 (log-normal)."""
    import torch

    from foveate.types import IGNORE_INDEX, ImageRecord, Sample

    generator = torch.Generator().manual_seed(1000 * case["seed"] + number)
    side = IMAGE_SIZE // PATCH
    samples = []
    for index in range(case["batch"]):
        prompt = int(torch.randint(10, 61, (), generator=generator))
        answer = int((60 * torch.exp(0.9 * torch.randn((), generator=generator))).clamp(5, 400))
        text = torch.randint(case["vocab"] - 1, (prompt + answer,), generator=generator)
        image = torch.full((IMAGE_TOKENS,), case["vocab"] - 1)
        ids = torch.cat([text[:4], image, text[4:]])
        labels = torch.where(torch.arange(len(ids)) < len(ids) - answer, IGNORE_INDEX, ids)
        pixels = [torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)]
        records = [ImageRecord(f"{number}-{index}", 0, "input", (side, side), 4)]
        samples.append(Sample(f"{number}-{index}", ids, labels, records, pixels=pixels))
    return samples


def make_weights(case: dict[str, Any], folder: str) -> None:
    """Random weights as a stock Llava folder, which both sides load."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    torch.manual_seed(case["seed"])
    encoder = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1,
                               image_size=IMAGE_SIZE, patch_size=PATCH)  # fmt: skip
    llm = Qwen2Config(**{"vocab_size": case["vocab"], "tie_word_embeddings": False, **SHAPES[case["shape"]]})
    config = LlavaConfig(vision_config=encoder, text_config=llm, image_token_index=case["vocab"] - 1,
                         tie_word_embeddings=llm.tie_word_embeddings)  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def foveate_side(case: dict[str, Any], folder: str) -> tuple[Any, Callable[[int], Any]]:
    from foveate.data.packing import pack
    from foveate.learner import Learner
    from foveate.model.build import load_lmm

    lmm, _ = load_lmm(folder)
    lmm.encoder.requires_grad_(False)
    learner = Learner(lmm).to(case["device"]).train()
    batches = [pack(draw_samples(case, number)).to(case["device"]) for number in range(BATCHES)]
    return learner, lambda number: learner(batches[number]).terms["text"].total / len(batches[number].target_ids)


def stock_side(case: dict[str, Any], folder: str) -> tuple[Any, Callable[[int], Any]]:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import LlavaForConditionalGeneration

    from foveate.types import IGNORE_INDEX

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.model.vision_tower.requires_grad_(False)
    model.to(case["device"]).train()
    batches = []
    for number in range(BATCHES):
        samples = draw_samples(case, number)
        padded = {
            "input_ids": pad_sequence([sample.input_ids for sample in samples], batch_first=True),
            "labels": pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(sample.labels) for sample in samples], batch_first=True),
            "pixel_values": torch.stack([sample.pixels[0] for sample in samples]),
        }
        batches.append({key: value.to(case["device"]) for key, value in padded.items()})
    return model, lambda number: model(**batches[number], use_cache=False).loss


class Memory:
    """Peak memory between two points: the process's resident set on a CPU, torch's allocations on CUDA. Bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def start(self) -> int:
        """Give freed memory back, so that it does not hide in the heap; what is left is in use."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def worker(side: str, case: dict[str, Any], folder: str) -> None:
    """One side: does a step for each line that it reads, and answers with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    limit = int(case["limit"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is the benchmark that dies
    import torch

    torch.set_num_threads(case["threads"])
    model, loss_of = (foveate_side if side == "foveate" else stock_side)(case, folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # no longer pages of the weights' file
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # a rate of 0 does all the work and leaves the weights equal on both sides, so that every loss can be compared
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True) if case["optimizer"] else None
    memory, kind = Memory(case["device"]), torch.device(case["device"]).type
    for line in sys.stdin:
        order = json.loads(line)
        before = memory.start() if order["memory"] else 0
        start, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(kind, torch.bfloat16, enabled=case["dtype"] == "bf16"):
            loss = loss_of(order["batch"])
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if kind == "cuda":
            torch.cuda.synchronize()
        answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "loss": value}
        del loss
        peak = memory.peak() if order["memory"] else 0
        print(json.dumps({**answer, "step": peak - before, "peak": peak}), file=answers, flush=True)


class Side:
    """A worker process, as seen from the benchmark."""

    def __init__(self, name: str, case: dict[str, Any], folder: str) -> None:
        case = {**case, "limit": int(0.9 * available_memory())}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, json.dumps(case), folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **ALLOCATORS[case["allocator"]], "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def step(self, batch: int, memory: bool = False) -> dict[str, float]:
        """Raises `MemoryError` when the step does not fit, `RuntimeError` when it fails otherwise."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"batch": batch, "memory": memory}), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        text = self.log.read()
        if code == -9 or "can't allocate memory" in text or "out of memory" in text or "MemoryError" in text:
            raise MemoryError
        raise RuntimeError(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Measure one case. A stock step that does not fit into memory is a result, not a failure."""
    import torch

    lengths = [[sample.length for sample in draw_samples(case, number)] for number in range(BATCHES)]
    padded = sum(len(batch) * max(batch) for batch in lengths)
    supervised = sum(sample.supervised for number in range(BATCHES) for sample in draw_samples(case, number))
    tokens = sum(map(sum, lengths))
    result: dict[str, Any] = {**case, "padding": 1 - tokens / padded, "supervised": supervised / tokens}
    result |= {"torch": torch.__version__, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([sys.executable, __file__, "--weights", json.dumps(case), folder], check=True, env=quiet)
        sides = {}
        for name in ("foveate", "stock"):
            side = Side(name, case, folder)
            stack.callback(side.close)
            try:
                side.step(0)  # makes the optimizer's state
                memory = [side.step(number, memory=True) for number in range(min(BATCHES, repeats))]
            except MemoryError:
                result[name] = None
                continue
            sides[name] = side
            result[name] = {key: max(step[key] for step in memory) for key in ("step", "peak")}
            result[name]["losses"] = [step["loss"] for step in memory]
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(repeats):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                try:
                    timed[name].append(sides[name].step(number % BATCHES))
                except MemoryError:  # others took what was left; what fitted before says nothing now
                    result[name] = None
                    del sides[name], timed[name]
    for name, steps in timed.items():
        result[name] |= {key: statistics.median(step[key] for step in steps) for key in ("seconds", "cpu_seconds")}
    if len(timed) == 2:
        pairs = list(zip(timed["foveate"], timed["stock"], strict=True))
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        result["faster"], result["faster_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
        result["faster_cpu"] = statistics.median(theirs["cpu_seconds"] / ours["cpu_seconds"] for ours, theirs in pairs)
        for key, name in (("step", "step_memory"), ("peak", "peak_memory")):
            result[name] = result["foveate"][key] / result["stock"][key]
        losses = zip(result["foveate"]["losses"], result["stock"]["losses"], strict=True)
        result["loss_gap"] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in losses)
    return result


def row(result: dict[str, Any]) -> str:
    """A line of the table of docs/performance.md."""
    cells = [result["shape"], f"{result['vocab']:,}", result["batch"], result["dtype"], result["allocator"]]
    ours, theirs = result["foveate"], result["stock"]
    cells += [f"{side['seconds']:.2f} s" if side else "out of memory" for side in (ours, theirs)]
    if ours and theirs:
        low, high = result["faster_range"]
        gib = " / ".join(f"{side['step'] / 2**30:.2f}" for side in (ours, theirs))
        cells += [f"**{result['faster']:.2f}×** ({low:.2f}–{high:.2f})", f"**{result['step_memory']:.2f}** ({gib} GiB)"]
        cells += [f"{result['peak_memory']:.2f}", f"{result['loss_gap']:.0e}"]
    return "| " + " | ".join(map(str, cells + ["–"] * (11 - len(cells)))) + " |"


HEAD = (
    "| LLM | vocabulary | batch | dtype | allocator | foveate | stock | faster | step memory | peak memory | loss gap |"
    + "\n|"
    + "---|" * 11
)


def verdict(result: dict[str, Any]) -> str:
    """What the case was held to, if anything."""
    said = [f"padding {result['padding']:.0%} of the stock batch, {result['supervised']:.0%} of tokens supervised"]
    if "faster_cpu" in result:
        said.append(f"{result['faster_cpu']:.2f}× in CPU time; load of the machine before: {result['load']:.1f}")
    target = TARGETS.get(result["vocab"]) if result["shape"] == "512x8" and result["allocator"] == "tuned" else None
    if target and result["device"] == "cpu" and "faster" in result:
        said.append(f"target {target}× {'met' if result['faster'] >= target else 'MISSED'}")
        if result["vocab"] == 151936:
            said.append(f"target half the memory {'met' if result['step_memory'] <= 0.5 else 'MISSED'}")
    if result["dtype"] == "fp32" and not math.isnan(gap := result.get("loss_gap", math.nan)):
        said.append(f"losses within 1e-5: {'yes' if gap <= 1e-5 else 'NO'}")
    return "  " + "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", choices=SHAPES, default="512x8", help="shape of the LLM")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="samples of a step")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--allocator", choices=ALLOCATORS, nargs="+", default=["tuned"], help="glibc's, on both sides")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timed steps")
    parser.add_argument("--no-optimizer", action="store_true", help="forward and backward only")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append each result to this file, one a line")
    options = parser.parse_args()
    print(HEAD, flush=True)
    for allocator, vocab, batch, dtype in itertools.product(
        options.allocator, options.vocab, options.batch, options.dtype
    ):
        case = {"device": options.device, "shape": options.shape, "vocab": vocab, "batch": batch, "dtype": dtype}
        case |= {"allocator": allocator, "optimizer": not options.no_optimizer, "threads": options.threads}
        result = run({**case, "seed": options.seed}, options.repeats)
        print(row(result), flush=True)
        print(verdict(result), file=sys.stderr, flush=True)
        if options.json:
            with options.json.open("a") as file:
                print(json.dumps(result), file=file)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["--weights"]:
        make_weights(json.loads(sys.argv[2]), sys.argv[3])
    else:
        main()
