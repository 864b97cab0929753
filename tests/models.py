"""Tiny models for tests: stock transformers Llavas from configs, and samples made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.types import IGNORE_INDEX, ImageRecord, Sample

IMAGE_TOKEN = 5
VOCABULARY = 97
GRID = (3, 3)

VISION: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "projection_dim": 24},
    "siglip": {"model_type": "siglip_vision_model", "vision_use_head": False},
    "dinov2": {"model_type": "dinov2"},
}
LLM: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6, "head_dim": 8},
}


def vision_config(family: str) -> dict[str, Any]:
    """A three-block encoder of 24 channels on 12×12 pixels: a 3×3 grid."""
    size = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
    return {**size, "intermediate_size": 48, "initializer_range": 0.3, **VISION[family]}


def llm_config(family: str) -> dict[str, Any]:
    """A two-block LLM of 32 channels."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return {**size, **tokens, "vocab_size": VOCABULARY, "initializer_range": 0.3, **LLM[family]}


def stock_llava(vision: str, llm: str, seed: int = 0) -> LlavaForConditionalGeneration:
    """An independent implementation with random weights, from transformers."""
    torch.manual_seed(seed)
    parts = {}
    for name, fields in (("vision_config", vision_config(vision)), ("text_config", llm_config(llm))):
        model_type = fields.pop("model_type")
        parts[name] = AutoConfig.for_model(model_type, **fields)
    config = LlavaConfig(
        **parts,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=GRID[0] * GRID[1],
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if vision == "siglip" else "default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)  # biases too, so that a dropped one shows
    return model


def saved_llava(vision: str, llm: str, folder: Path, seed: int = 0) -> LlavaForConditionalGeneration:
    """The same, also written to `folder`."""
    model = stock_llava(vision, llm, seed)
    model.save_pretrained(folder)
    return model


def make_sample(name: str, pieces: list[int | str], generator: torch.Generator, supervise: bool = True) -> Sample:
    """A sample of random text and random pictures: an integer is so many text tokens, "image" an image."""
    ids: list[int] = []
    labels: list[int] = []
    images: list[ImageRecord] = []
    pixels: list[torch.Tensor] = []
    for piece in pieces:
        if isinstance(piece, int):
            text = torch.randint(6, VOCABULARY, (piece,), generator=generator).tolist()
            ids += text
            keep = torch.rand(piece, generator=generator) < 0.7
            labels += [token if kept and supervise else IGNORE_INDEX for token, kept in zip(text, keep, strict=True)]
        else:
            tokens = GRID[0] * GRID[1]
            images.append(ImageRecord(name, len(images), "input", GRID, len(ids)))
            pixels.append(torch.randn(3, 12, 12, generator=generator))
            ids += [IMAGE_TOKEN] * tokens
            labels += [IGNORE_INDEX] * tokens
    return Sample(name, torch.tensor(ids), torch.tensor(labels), images, pixels=pixels)


def mixed_samples(seed: int) -> list[Sample]:
    """0, 1, 3 and two adjacent images in a sample, image first and last, uneven lengths, one image-only sample."""
    generator = torch.Generator().manual_seed(seed)
    layouts: list[list[int | str]] = [
        [7],
        ["image", 9],
        [4, "image", 6],
        [3, "image", 2, "image", 5, "image", 8],
        [2, "image", "image", 11],
        [12, "image"],
        ["image"],
        [21],
    ]
    return [make_sample(f"s{number}", layout, generator) for number, layout in enumerate(layouts)]
