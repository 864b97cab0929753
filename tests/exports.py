"""Models to export: random or trained a little, of every family; and a script that knows transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from foveate.data.sample import SampleRules
from foveate.data.templates import load_template
from foveate.data.tokenizer import load_tokenizer, train_tokenizer
from foveate.data_room import DataRoom
from foveate.model.build import CARD, blueprint, build_lmm, load_lmm, save_lmm
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe

_VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 48, "initializer_range": 0.3, **_VIT},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 48, **_VIT, "image_size": 13},
    "dinov2": {"model_type": "dinov2", "initializer_range": 0.3, **_VIT},
    "registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 3, "initializer_range": 0.3, **_VIT},
}
_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT |= {"intermediate_size": 64, "initializer_range": 0.3}
TIMM = {
    "type": "timm", "name": "vit_tiny_patch16_224", "image_size": 48, "layer": 2,
    "args": {"depth": 3, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip
MLP = {"type": "mlp", "depth": 2}


def encoder(family: str, **options: Any) -> dict[str, Any]:
    """An encoder of three blocks, read after the second: a 3×3 grid (SigLIP's last row of pixels is not read)."""
    return {"config": ENCODERS[family], "layer": -2, **options}


def llm(model_type: str, tied: bool = False, tokenizer: Any = None, **fields: Any) -> dict[str, Any]:
    """An LLM of two blocks."""
    config = {"model_type": model_type, "tie_word_embeddings": tied, **_TEXT, **fields}
    return {"config": config, "tokenizer": tokenizer or {"vocab_size": 400}}


def llama_tokenizer(folder: Path) -> str:
    """A tokenizer that begins every text with BOS by itself, as Llama's do, and has no padding token."""
    trained = train_tokenizer(["Which digit? It is 4. Say the word."] * 3, 400)  # " It" is one token
    trained.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    backend = trained.backend_tokenizer
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", trained.bos_token_id)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a").input_ids[0] == trained.bos_token_id and tokenizer.pad_token is None
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, corpus: Path, model: Mapping[str, Any], **stage: Any) -> Any:
    """A recipe of one stage of two steps, its run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = recipe_dict(corpus, output=str(folder / "run"), model=dict(model))
    content["stages"][0] |= {"max_steps": 2, "geometry": "pad", "train": {"projector": 1e-2}, **stage}
    return load_recipe(write_recipe(folder, content))


def trained_run(folder: Path, corpus: Path, model: Mapping[str, Any], **stage: Any) -> Path:
    """A run."""
    return train(recipe(folder, corpus, model, **stage), display=Display(quiet=True)).folder


def random_model(folder: Path, corpus: Path, model: Mapping[str, Any], **stage: Any) -> Path:
    """A model folder as a run has it, of random weights: biases and norms too, so that one that is lost shows."""
    loaded = recipe(folder, corpus, model, **stage)
    plan = blueprint(loaded.model)
    room, last = DataRoom(loaded, plan), loaded.stages[-1]
    torch.manual_seed(len(str(model)))
    lmm = build_lmm(plan, len(room.tokenizer))
    with torch.no_grad():
        for parameter in lmm.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    facts = {"image_token_id": room.rules(last).image_token_id, "geometry": last.geometry, "template": last.template}
    save_lmm(lmm, plan, folder / "model", room.tokenizer, {**facts, "system": last.system})
    return folder / "model"


def our_rules(source: Path) -> tuple[Any, SampleRules]:
    """The trained model, and how it was trained to read."""
    lmm, plan = load_lmm(source)
    folder = source if (source / CARD).is_file() else source / "model"
    card, tokenizer = json.loads((folder / CARD).read_text()), load_tokenizer(folder).tokenizer
    template = load_template(card["template"], tokenizer, card.get("system"))
    return lmm.eval(), SampleRules(tokenizer, template, lmm.encoder.spec, plan.visual_grid(), card["geometry"])


def pictures(folder: Path) -> list[str]:
    """PNG files: wide, high, of the encoder's own size, and grey."""
    generator, names = np.random.default_rng(7), []
    for number, (width, height) in enumerate(((31, 17), (14, 40), (12, 12), (21, 20))):
        values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(values).convert("L" if number == 3 else "RGB")
        image.save(folder / f"{number}.png")
        names.append(str(folder / f"{number}.png"))
    return names


SCRIPT = """
import json, sys
sys.modules["foveate"] = None  # this script is a stranger's: importing foveate would be an error
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
work = json.load(open(sys.argv[1]))
found = {}
for name, job in work.items():
    trust = {"trust_remote_code": True} if job["own_code"] else {}
    options = {"output_loading_info": True, **trust}
    model, report = AutoModelForImageTextToText.from_pretrained(job["folder"], **options)
    processor = AutoProcessor.from_pretrained(job["folder"], **trust)
    model.eval()
    texts, shown, singles = [], [], []

    def answer(**inputs):
        with torch.no_grad():
            # learned positions (GPT-2's) must be told where a padded prompt begins, as `generate` does by itself
            learned = model.config.text_config.model_type == "gpt2"
            positions = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)} if learned else {}
            logits = model(**inputs, **positions).logits
            whole = model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False)
        return logits, whole[:, inputs["input_ids"].shape[1] :]

    for conversation in job["conversations"]:
        text = processor.apply_chat_template(conversation["messages"], add_generation_prompt=True)
        images = [Image.open(file) for file in conversation["images"]]
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        logits, tokens = answer(**inputs)
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        direct = processor.apply_chat_template(conversation["items"], **options)
        same = all(torch.equal(inputs[key], direct[key]) for key in inputs)
        one = {"text": text, "ids": inputs["input_ids"][0], "logits": logits[0], "tokens": tokens[0], "same": same}
        singles.append({**one, "pixels": inputs.get("pixel_values")})
        texts.append(text)
        shown.append(images)
    batch = processor(images=[i for images in shown for i in images], text=texts, padding=True, return_tensors="pt")
    logits, tokens = answer(**batch)
    found[name] = {
        "class": type(model).__name__, "report": {kind: sorted(names) for kind, names in report.items()},
        "singles": singles, "ends": model.generation_config.eos_token_id,
        "batch": {"logits": logits, "tokens": tokens, "mask": batch["attention_mask"]},
    }
torch.save(found, sys.argv[2])
"""


def opened_by_transformers(work: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the script makes of exported folders, in a process of its own that cannot import foveate."""
    (folder / "work.json").write_text(json.dumps(work))
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-I", *map(str, (folder / "script.py", folder / "work.json", folder / "found.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found
