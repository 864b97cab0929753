"""The model is LLaVA: with the same weights, logits and loss equal transformers' own implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate.data.packing import pack
from foveate.learner import Learner
from foveate.model.build import load_lmm
from foveate.types import IGNORE_INDEX, Sample
from tests.models import IMAGE_TOKEN, VOCABULARY, mixed_samples, saved_llava


def stock_forward(model: LlavaForConditionalGeneration, sample: Sample) -> tuple[Tensor, Tensor]:
    """Logits `[L, V]` and the summed loss of one sample, alone, by transformers."""
    pixels = torch.stack(sample.pixels) if sample.pixels else None
    logits = model(input_ids=sample.input_ids[None], pixel_values=pixels).logits[0]
    targets = sample.labels[1:]
    loss = torch.nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return logits, loss


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("llm", ["qwen2", "llama"])
@torch.no_grad()
def test_logits_and_loss_equal_stock_llava(vision: str, llm: str, tmp_path: Path) -> None:
    stock = saved_llava(vision, llm, tmp_path / "llava")
    lmm, _ = load_lmm(tmp_path / "llava")
    samples = mixed_samples(seed=1)
    batch = pack(samples)
    ours = dict(zip(batch.sample_ids, lmm.eval().logits(batch).split(list(batch.lengths)), strict=True))
    total = torch.zeros(())
    for sample in samples:
        logits, loss = stock_forward(stock, sample)
        assert logits.std() > 0.05, "a degenerate reference proves nothing"
        assert logits.shape == (sample.length, VOCABULARY)
        torch.testing.assert_close(ours[sample.id], logits, atol=1e-5, rtol=1e-5)
        total += loss
    mean = Learner(lmm)(batch).terms["text"].total / sum(sample.supervised for sample in samples)
    torch.testing.assert_close(mean, total / sum(sample.supervised for sample in samples), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stock_loss_with_its_own_labels(tmp_path: Path) -> None:
    """Also against the loss that Llava computes itself, for one padded batch of single-image samples."""
    stock = saved_llava("clip", "qwen2", tmp_path / "llava")
    lmm, _ = load_lmm(tmp_path / "llava")
    samples = [sample for sample in mixed_samples(seed=2) if len(sample.images) == 1 and sample.supervised]
    longest = max(sample.length for sample in samples)

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows])

    ids = padded([sample.input_ids for sample in samples], 0)
    mask = padded([torch.ones_like(sample.input_ids) for sample in samples], 0)
    labels = padded([sample.labels for sample in samples], IGNORE_INDEX)
    pixels = torch.stack([picture for sample in samples for picture in sample.pixels])
    reference = stock(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    total = Learner(lmm)(pack(samples)).terms["text"].total
    torch.testing.assert_close(total / sum(sample.supervised for sample in samples), reference, atol=1e-5, rtol=1e-5)


def test_image_token_ids_do_not_matter(tmp_path: Path) -> None:
    """Positions were recorded when the sample was built: text that holds the image token's id stays text."""
    saved_llava("clip", "qwen2", tmp_path / "llava")
    lmm, _ = load_lmm(tmp_path / "llava")
    generator = torch.Generator().manual_seed(0)
    from tests.models import make_sample

    sample = make_sample("s", [4, "image", 6], generator)
    sample.input_ids[1] = IMAGE_TOKEN
    assert lmm.logits(pack([sample])).shape == (sample.length, VOCABULARY)
