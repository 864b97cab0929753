"""`export_model`: a trained LMM as a folder that transformers opens by itself.

Stock where the model is a stock Llava; else, on request, with a modelling file of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from foveate.data.sample import SampleRules
from foveate.data.templates import load_template
from foveate.data.tokenizer import load_tokenizer
from foveate.errors import ModelError, RunError
from foveate.export.chat import make_generation_config, make_processor
from foveate.export.layout import MODELLING, make_config, model_class, name_weights, not_exportable, not_stock
from foveate.export.verify import check_export, expected_logits
from foveate.files import atomic_folder
from foveate.model.build import CARD, Blueprint, load_lmm
from foveate.model.lmm import LMM

__all__ = ["DTYPES", "Exported", "export_model", "not_stock"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written. `gap`: how far the logits of transformers are from ours, None where that was not checked."""

    folder: Path
    own_code: bool
    parameters: int
    dtype: str
    left_out: list[str]
    gap: float | None


def export_model(
    source: str | Path, out: str | Path, *, own_code: bool = False, dtype: str = "fp32", check: bool = True
) -> Exported:
    """Write the model of a run, or a model folder, as `out`: complete or absent.

    `own_code`: with a modelling file that loads with ``trust_remote_code=True``; without it, what is no stock Llava is
    refused. `check` loads the result with transformers and compares it with the model, in fp32.

    Raises `RunError` where `source` has no model, or `out` is not empty or cannot be written; `ModelError` where the
    model cannot be exported so.
    """
    source, out = (Path(path).expanduser().resolve() for path in (source, out))
    folder = _model_folder(source)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} is there already and not empty: give another folder, or delete it.")
    lmm, plan = load_lmm(folder)
    _check_kind(lmm, own_code)
    rules = _rules(folder, plan)
    parameters = sum(parameter.numel() for parameter in lmm.parameters())
    for tensor in lmm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(DTYPES[dtype]))  # what is written is what is checked
    heads = sorted(head.name for head in (folder / "objectives").glob("*"))
    with atomic_folder(out, seal=False) as aside:
        _write(lmm, rules, load_tokenizer(folder).tokenizer, own_code, DTYPES[dtype], aside)
        gap = None
        if check:
            expected = expected_logits(lmm, rules)
            del lmm  # two copies of a large model may not fit
            gap = check_export(aside, model_class(own_code), expected)
    return Exported(out, own_code, parameters, dtype, heads, gap)


def _write(lmm: LMM, rules: SampleRules, tokenizer: Any, own_code: bool, dtype: torch.dtype, folder: Path) -> None:
    """Everything into `folder`. `tokenizer` is changed."""
    config = make_config(lmm, rules.image_token_id, rules.visual_grid, own_code)
    processor = make_processor(rules, tokenizer, "full" if own_code else config.vision_feature_select_strategy)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    config.dtype, config.architectures = dtype, [model_class(own_code).__name__]
    _write_weights(name_weights(lmm, config, own_code), dtype, folder)
    config.save_pretrained(folder)
    make_generation_config(rules, tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    _help_older_readers(folder, processor)
    if own_code:
        code = files("foveate.export") / f"{MODELLING}.py"
        (folder / f"{MODELLING}.py").write_text(code.read_text(encoding="utf-8"), encoding="utf-8")


def _model_folder(source: Path) -> Path:
    """The model folder that `source` is, or that the run `source` has."""
    for folder in (source, source / "model"):
        if (folder / CARD).is_file():
            return folder
    if (source / "recipe.yaml").is_file():
        command = f"foveate train {source / 'recipe.yaml'} --resume"
        raise RunError(f"{source} has no model yet: the run has not finished. Go on with it: {command}")
    what = "neither a run nor a model folder of foveate" if source.is_dir() else "no folder"
    raise RunError(f"{source} is {what}. Give the folder that `foveate train` wrote, such as runs/NAME.")


def _check_kind(lmm: LMM, own_code: bool) -> None:
    if reasons := not_exportable(lmm):
        raise ModelError(
            f"the model cannot be exported: {'; '.join(reasons)}. It can start other recipes, as `model: {{from: …}}`."
        )
    if not own_code and (reasons := not_stock(lmm)):
        raise ModelError(
            f"the model is no stock Llava: {'; '.join(reasons)}. With --own-code the folder brings a modelling file "
            f"that computes it, and loads with trust_remote_code=True."
        )


def _rules(folder: Path, plan: Blueprint) -> SampleRules:
    """How the last stage turned conversations into samples, without objectives."""
    card = plan.card
    if missing := [key for key in ("template", "geometry") if key not in card]:
        raise ModelError(f"{folder / CARD} lacks {' and '.join(missing)}, which the exported processor needs")
    tokenizer = load_tokenizer(folder).tokenizer
    return SampleRules(
        tokenizer=tokenizer,
        template=load_template(card["template"], tokenizer, _system(folder, card)),
        encoder=plan.encoder_spec(),
        visual_grid=plan.visual_grid(),
        geometry=card["geometry"],
        max_length=sys.maxsize,
    )


def _system(folder: Path, card: Mapping[str, Any]) -> str | None:
    """The last stage's system message; models of older runs do not carry it, but the recipe beside them does."""
    recipe = folder.parent / "recipe.yaml"
    if "system" in card or not recipe.is_file():
        return card.get("system")
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["stages"][-1].get("system")


def _write_weights(state: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Sharded safetensors; tensors that share memory (a head tied where Llava cannot tie it) are written twice."""
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        written[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_torch_state_dict(written, folder)


def _help_older_readers(folder: Path, processor: Any) -> None:
    """Say what transformers 5 renamed by its old name too: others, which do not know the new one, would not notice."""
    processor.image_processor.save_pretrained(folder)  # they read it from a file of its own
    for name, change in (("config.json", _old_rotations), ("tokenizer_config.json", _old_tokenizer)):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _old_rotations(config: dict[str, Any]) -> None:
    given = dict(config["text_config"].get("rope_parameters") or {})
    if "rope_theta" in given:  # else the LLM has none, or one a kind of layer, which older releases do not know either
        config["text_config"]["rope_theta"] = given.pop("rope_theta")
        if "partial_rotary_factor" in given:
            config["text_config"]["partial_rotary_factor"] = given.pop("partial_rotary_factor")
        if given.get("rope_type", "default") != "default":
            config["text_config"]["rope_scaling"] = given


def _old_tokenizer(config: dict[str, Any]) -> None:
    # by default they add BOS, and number the segments of a text, which GPT-2 would add to its embeddings
    config |= {"add_bos_token": False, "add_eos_token": False, "model_input_names": ["input_ids", "attention_mask"]}
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
