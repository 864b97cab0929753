"""A small LLaVA corpus on disk, of real scanned digits, and recipes for tiny models that train on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

ENCODER = {
    "config": {
        "model_type": "siglip_vision_model", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "image_size": 16, "patch_size": 4, "vision_use_head": False,
    },
    "layer": -1,
}  # fmt: skip
LLM = {
    "config": {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 64, "initializer_range": 0.08,
    },
    "tokenizer": {"vocab_size": 400},
}  # fmt: skip


def picture(index: int, folder: Path) -> str:
    """Write scan `index` as a PNG of 24×24 pixels, return its name."""
    scan = (load_digits().images[index] * 15).astype(np.uint8)
    name = f"{index}.png"
    Image.fromarray(scan).resize((24, 24), Image.Resampling.BICUBIC).convert("RGB").save(folder / name)
    return name


def write_corpus(folder: Path, samples: int = 48) -> Path:
    """`data.json` and `images/`: one and two images, text only, images only, in turn."""
    images = folder / "images"
    images.mkdir(parents=True)
    digits = load_digits().target
    rows: list[dict[str, Any]] = []
    for number in range(samples):
        first, second = 2 * number, 2 * number + 1
        if number % 6 == 4:
            turns = [("human", f"Say the word {number}."), ("gpt", "word " * (1 + number % 5))]
            rows.append({"id": f"text{number}", "conversations": turns})
        elif number % 6 == 5:
            rows.append({"id": f"bare{number}", "image": picture(first, images)})
        elif number % 6 == 3:
            turns = [("human", "<image><image>\nWhich two?"), ("gpt", f"A {digits[first]} and a {digits[second]}.")]
            rows.append({"id": f"two{number}", "image": [picture(first, images), picture(second, images)]})
            rows[-1]["conversations"] = turns
        else:
            turns = [("human", "<image>\nWhich digit?"), ("gpt", f"It is {digits[first]}.")]
            turns += [("human", "Sure?"), ("gpt", "Yes, quite sure.")] * (number % 3)
            rows.append({"id": f"one{number}", "image": picture(first, images), "conversations": turns})
    for row in rows:
        if "conversations" in row:
            row["conversations"] = [{"from": who, "value": text} for who, text in row["conversations"]]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def recipe_dict(corpus: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of one short stage that trains everything; `changes` replace its top-level keys."""
    stage = {
        "name": "only",
        "data": [{"path": str(corpus / "data.json"), "images": str(corpus / "images")}],
        "train": {"encoder": 1e-3, "projector": 1e-3, "llm": 1e-3},
        "batch_size": 12,
        "max_steps": 4,
    }
    return {
        "name": "test",
        "output": str(corpus / "run"),
        "model": {"encoder": ENCODER, "projector": {"type": "mlp", "depth": 2}, "llm": LLM},
        "stages": [stage],
        "hardware": {"workers": 0},
        **changes,
    }


def write_recipe(folder: Path, content: Mapping[str, Any], name: str = "recipe.yaml") -> Path:
    """The mapping as a YAML file."""
    path = folder / name
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path
