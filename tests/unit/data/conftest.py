"""Real pictures, tokenizers trained on the spot, and rules to build samples with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foveate.data.dataset import ConversationDataset
from foveate.data.sample import SampleRules
from foveate.data.templates import load_template
from foveate.data.tokenizer import train_tokenizer, with_image_token
from foveate.types import Conversation, EncoderSpec, ImageRef, Turn

torch.set_num_threads(1)

TEXTS = [
    "Describe the picture.",
    "A Chinese temple with red columns under a blue sky.",
    "An orange flower, a dahlia, in front of green leaves.",
    "Which digit is at a1? There are 3 red digits and 2 green ones.",
    "<|im_start|>user\n<|im_end|>\nassistant system USER: ASSISTANT: [INST] [/INST]",
]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    return [Image.fromarray(array) for array in load_sample_images().images]


@pytest.fixture(scope="session")
def digits() -> list[Image.Image]:
    """Scanned digits as 48x48 colour pictures."""
    scans = (load_digits().images[:16] * 15.9375).astype(np.uint8).repeat(6, axis=1).repeat(6, axis=2)
    return [Image.fromarray(np.stack([scan, scan // 2, 255 - scan], axis=-1)) for scan in scans]


@pytest.fixture
def encoder() -> EncoderSpec:
    return EncoderSpec(48, (6, 6), 32, CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="session")
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


def _llama(template: str | None, *extra: str) -> Any:
    """A Llama-2-like tokenizer: byte-fallback BPE on words that start with a metaspace, with <s> and </s>."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>", *extra)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    backend.train_from_iterator([line for text in TEXTS for line in text.splitlines()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=extra[0] if extra else "</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return with_image_token(tokenizer).tokenizer


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    return _llama(None)


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Any:
    return _llama(None, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")


@pytest.fixture
def make_rules(encoder: EncoderSpec, chatml_tokenizer: Any) -> Callable[..., SampleRules]:
    """`make_rules(template="chat", tokenizer=…, system=…, visual_grid=(2, 2), …)`."""

    def make(template: str = "chat", tokenizer: Any = None, system: str | None = None, **changes: Any) -> SampleRules:
        tokenizer = tokenizer or chatml_tokenizer
        defaults = {"encoder": encoder, "visual_grid": (2, 2), "geometry": "resize", "max_length": 512}
        return SampleRules(tokenizer, load_template(template, tokenizer, system), **{**defaults, **changes})

    return make


@pytest.fixture
def talk() -> Callable[..., Conversation]:
    """`talk("question", "answer", …, images=[…], targets=[…], id=…)`."""

    def make(*texts: str, images: Any = (), targets: Any = (), id: str = "a") -> Conversation:
        turns = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
        refs = [*(ImageRef(image) for image in images), *(ImageRef(image, "target") for image in targets)]
        return Conversation(id, tuple(turns), tuple(refs))

    return make


class Listed(ConversationDataset):
    """A data set of given conversations; an exception in the list is raised where it stands."""

    def __init__(self, rows: list[Any]):
        super().__init__(self.Options())
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        if isinstance(self.rows[index], Exception):
            raise self.rows[index]
        return self.rows[index]

    def fingerprint(self) -> str:
        return str(len(self.rows))


@pytest.fixture
def listed() -> type[Listed]:
    return Listed


@pytest.fixture
def corpus(tmp_path: Path, photographs: list[Image.Image]) -> Callable[..., tuple[Path, Path]]:
    """Writes rows as JSON or JSONL beside a folder of two photographs, `temple.jpg` and `flower.png`."""

    def write(rows: list[Any] | str, name: str = "rows.json") -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        photographs[0].resize((160, 107)).save(folder / "temple.jpg")
        photographs[1].resize((107, 160)).save(folder / "flower.png")
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text = rows if isinstance(rows, str) else lines if name.endswith("l") else json.dumps(rows, ensure_ascii=False)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name, folder

    return write
