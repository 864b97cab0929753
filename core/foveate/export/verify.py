"""Before an export is handed out, transformers loads it: it must read, see and answer as the trained model does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from foveate.data.packing import pack
from foveate.data.sample import SampleRules, build_sample, load_pixels
from foveate.errors import ModelError
from foveate.export.modeling_foveate_llava import FoveateLlavaConfig
from foveate.model.lmm import LMM
from foveate.types import IMAGE_PLACEHOLDER, Conversation, ImageRef, Turn

TOLERANCE = 1e-4
"""Of the largest logit: in fp32 two ways to compute the same thing differ by less."""

_QUESTION, _ANSWER = "What is this?", "Nothing."


@torch.no_grad()
def expected_logits(lmm: LMM, rules: SampleRules) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids `[L]`, pixels `[1, 3, S, S]` and logits `[L, V]` of a conversation about a picture of noise, by us."""
    turns = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{_QUESTION}"), Turn("assistant", _ANSWER))
    conversation = Conversation("probe", turns, (ImageRef(_noise()),))
    batch = pack([load_pixels(build_sample(conversation, rules), rules)])
    return batch.input_ids, batch.pixels, lmm.eval().logits(batch)


@torch.no_grad()
def check_export(folder: Path, model_class: Any, expected: tuple[Tensor, Tensor, Tensor]) -> float:
    """How far the logits of the exported folder are from `expected`, in fp32: the largest difference.

    Raises `ModelError` where weights are missing or left over, or prompt, pixels or logits differ.
    """
    ids, pixels, logits = expected
    # the code that a folder brings is this one: no need to run what lies there
    AutoConfig.register(FoveateLlavaConfig.model_type, FoveateLlavaConfig, exist_ok=True)
    with _silence():
        model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder)
    if wrong := {kind: sorted(names)[:4] for kind, names in report.items() if names}:
        raise ModelError(f"transformers does not load the export whole: {wrong}")
    content = [{"type": "image", "image": _noise()}, {"type": "text", "text": _QUESTION}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": _ANSWER}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    if inputs["input_ids"][0].tolist() != ids.tolist():
        theirs, ours = (processor.tokenizer.decode(row) for row in (inputs["input_ids"][0], ids))
        raise ModelError(f"the export reads a conversation as {theirs!r}, training read it as {ours!r}")
    if not torch.equal(inputs["pixel_values"], pixels):
        raise ModelError("the export's image processor makes other pixels of a picture than training did")
    gap = float((model.eval()(**inputs).logits[0] - logits).abs().max())
    if not gap <= TOLERANCE * float(logits.abs().max()):
        raise ModelError(f"the export computes other logits than the model: they differ by {gap:.1e}")
    return gap


@contextmanager
def _silence() -> Iterator[None]:
    """Without bars and warnings of transformers: what it misses or leaves over is read from its report."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _noise() -> Image.Image:
    """A picture that no geometry leaves as it is."""
    values = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return Image.fromarray(values)
