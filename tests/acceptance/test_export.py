"""An export opens anywhere: a process without foveate sees, reads and answers exactly as the trained model does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.data.packing import pack
from foveate.data.sample import SampleRules, build_sample, load_pixels
from foveate.export import export_model
from foveate.types import IGNORE_INDEX, Conversation, ImageRef, Sample, Turn
from tests.exports import (
    MLP,
    TIMM,
    encoder,
    llama_tokenizer,
    llm,
    opened_by_transformers,
    our_rules,
    pictures,
    random_model,
    trained_run,
)

FULL = {"encoder": 1e-3, "projector": 1e-3, "llm": 1e-3}
LORA = {"projector": 1e-2, "llm": {"lr": 1e-2, "lora": {"r": 4, "alpha": 8}}}
STOCK: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (model, stage); with `train` in the stage it is trained, else its weights are random
    "clip-qwen2-full": (
        {"encoder": encoder("clip"), "projector": MLP, "llm": llm("qwen2", tied=True)},
        {"train": FULL, "geometry": "crop"},
    ),
    "siglip-llama-lora": (
        {"encoder": encoder("siglip"), "projector": MLP, "llm": llm("llama")},
        {"train": LORA, "geometry": "pad"},
    ),
    "dinov2-qwen2-projector": (
        {"encoder": encoder("dinov2"), "projector": MLP, "llm": llm("qwen2")},
        {"train": {"projector": 1e-2}, "geometry": "resize", "template": "qwen2"},
    ),
    "siglip-qwen2-encoder": (
        {"encoder": encoder("siglip"), "projector": MLP, "llm": llm("qwen2")},
        {"train": {"projector": 1e-2, "encoder": 1e-2}, "geometry": "crop"},
    ),
    "clip-llama": (
        {"encoder": encoder("clip"), "projector": {**MLP, "bias": False}, "llm": llm("llama", tied=True)},
        {"geometry": "resize", "system": "Answer in \"one\" word \\ 'or' {% two %}.\n\té 😀"},
    ),
    "dinov2-llama-bos": (
        {"encoder": encoder("dinov2"), "projector": MLP, "llm": "BOS"},
        {"geometry": "pad", "template": "vicuna"},
    ),
    "clip-gpt2-every-feature": (
        {"encoder": encoder("clip", select="full"), "projector": MLP, "llm": llm("gpt2", tied=True)},
        {"geometry": "pad"},
    ),
}
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear-normalized": (
        {"encoder": encoder("clip"), "projector": {"type": "linear", "normalize": True}, "llm": llm("qwen2")},
        {"geometry": "pad"},
    ),
    "timm-mlp3": (
        {"encoder": TIMM, "projector": {"type": "mlp", "depth": 3, "bias": False}, "llm": llm("llama", tied=True)},
        {"train": FULL, "geometry": "resize"},
    ),
    "shuffle": (
        {"encoder": encoder("siglip"), "projector": {"type": "pixel_shuffle_mlp", "factor": 3}, "llm": llm("qwen2")},
        {"geometry": "crop"},
    ),
    "registers-granite": (
        {"encoder": encoder("registers"), "projector": MLP, "llm": llm("granite", logits_scaling=3.0)},
        {"geometry": "pad"},
    ),
    "head-bias": (
        {"encoder": encoder("clip"), "projector": MLP, "llm": llm("phi", num_key_value_heads=4)},
        {"geometry": "pad"},
    ),
}
QUESTIONS = (
    ("Say the word.", []),
    ("<image>\nWhich digit?", [0]),
    ("<image>\n<image>\nWhich two, and this <image>?", [1, 2, 3]),
    ("Is it <image>, or not?", [3]),
)
NAMES = [*STOCK, *OWN]


@dataclass
class Case:
    """A model, what transformers made of its export, and how far apart they are."""

    source: Path
    out: Path
    found: dict[str, Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> dict[str, Case]:
    """All models, exported, and opened in one process."""
    folder = tmp_path_factory.mktemp("exports")
    files, made = pictures(folder), {}
    for name, (model, stage) in {**STOCK, **OWN}.items():
        model = {**model, "llm": llm("llama", tokenizer=llama_tokenizer(folder / "tokenizer"))} if (
            model["llm"] == "BOS"
        ) else model  # fmt: skip
        make = trained_run if "train" in stage else random_model
        made[name] = make(folder / name, shared_corpus, model, **stage)
        export_model(made[name], folder / "out" / name, own_code=name in OWN)
    conversations = [
        {"images": [files[image] for image in images], "messages": messages(text), "items": items(text, images, files)}
        for text, images in QUESTIONS
    ]
    work = {
        name: {"folder": str(folder / "out" / name), "own_code": name in OWN, "conversations": conversations}
        for name in made
    }
    found = opened_by_transformers(work, folder)
    return {name: Case(made[name], folder / "out" / name, found[name]) for name in made}


def messages(text: str) -> list[dict[str, Any]]:
    """Two turns before the question; contents are text with placeholders."""
    said = ("Hello.", "Yes?", text)
    return [{"role": ("user", "assistant")[at % 2], "content": line} for at, line in enumerate(said)]


def items(text: str, images: list[int], files: list[str]) -> list[dict[str, Any]]:
    """The same, the question as a list of items."""
    parts, shown = text.split("<image>"), iter(images)
    content: list[dict[str, str]] = [{"type": "text", "text": parts[0]}] if parts[0] else []
    for part in parts[1:]:
        content.append({"type": "image", "path": files[next(shown)]})
        content += [{"type": "text", "text": part}] if part else []
    return [*messages(text)[:-1], {"role": "user", "content": content}]


def our_prompt(rules: SampleRules, text: str, files: list[str]) -> Sample:
    """A question as training reads it: the sample of the question and some answer, cut before the answer."""
    said = ("Hello.", "Yes?", text, "It is 4.")
    turns = tuple(Turn("assistant" if at % 2 else "user", line) for at, line in enumerate(said))
    sample = load_pixels(build_sample(Conversation("q", turns, tuple(map(ImageRef, map(Path, files)))), rules), rules)
    learned = sample.labels != IGNORE_INDEX
    ends = learned & ~torch.nn.functional.pad(learned, (1, 0))[:-1]
    end = int(ends.nonzero()[-1])
    return replace(sample, input_ids=sample.input_ids[:end], labels=sample.labels[:end])


@torch.no_grad()
def our_answer(lmm: Any, prompt: Sample, ends: list[int]) -> tuple[Tensor, list[int]]:
    """Logits of the prompt, and ten greedy tokens that are no end, each from a whole forward of our own."""
    first, tokens = lmm.logits(pack([prompt])), list[int]()
    for _ in range(10):
        grown = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)])
        last = lmm.logits(pack([replace(prompt, input_ids=grown, labels=grown)]))[-1]
        last[ends] = -torch.inf
        tokens.append(int(last.argmax()))
    return first, tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_gets_our_logits_and_answers(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    lmm, rules = our_rules(case.source)
    files = pictures(case.out.parent)
    assert case.found["class"] == (
        "LlavaForConditionalGeneration" if name in STOCK else "FoveateLlavaForConditionalGeneration"
    )
    assert not any(case.found["report"].values())
    for (text, images), theirs in zip(QUESTIONS, case.found["singles"], strict=True):
        prompt = our_prompt(rules, text, [files[image] for image in images])
        assert theirs["ids"].tolist() == prompt.input_ids.tolist()
        assert theirs["same"], "items and text with placeholders must be the same prompt and pixels"
        logits, tokens = our_answer(lmm, prompt, case.found["ends"])
        if images:
            assert torch.equal(theirs["pixels"], torch.stack(prompt.pixels))
        assert logits.std() > 0.05, "a degenerate reference proves nothing"
        torch.testing.assert_close(theirs["logits"], logits, atol=1e-4, rtol=0)
        assert theirs["tokens"].tolist() == tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_samples(cases: dict[str, Case], name: str) -> None:
    found = cases[name].found
    for row, single in enumerate(found["singles"]):
        shown = found["batch"]["mask"][row].bool()
        assert not shown[: len(shown) - len(single["ids"])].any(), "padding is on the left"
        torch.testing.assert_close(found["batch"]["logits"][row, shown], single["logits"], atol=1e-4, rtol=0)
        assert found["batch"]["tokens"][row].tolist() == single["tokens"].tolist()
