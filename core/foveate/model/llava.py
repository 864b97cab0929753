"""Starting from LLaVA: a stock `LlavaForConditionalGeneration` folder or hub id, read as our three parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from foveate.errors import ModelError
from foveate.model.encoder import FAMILIES, TransformersEncoder, config_fields, read_image_processor, read_pretrained

PROJECTOR_KEYS = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
"""Stock Llava's projector → our two-layer `mlp`."""


@dataclass(frozen=True)
class LlavaParts:
    """A stock Llava in our words. Only its configuration has been read; `state` reads the weights."""

    parts: dict[str, dict[str, Any]]
    """`encoder`, `projector`, `llm` → `type` and `options`; architectures inlined, no weights named."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    facts: dict[str, Any]
    """`image_token_id`: the token that stands for a visual token in the model's own prompts."""
    state: Callable[[], dict[str, Tensor]]
    """The weights in their own dtype, under the names of an LMM's state dict (a tied head has none)."""


def read_llava(source: str, revision: str = "main") -> LlavaParts:
    """Read a stock Llava's configuration; both layouts of its weights, one file or many, are accepted.

    The encoder is cut after the layer that Llava reads: later blocks, the final norm and heads stay behind. Raises
    `ModelError` for what cannot be read, and for what our parts would not compute exactly.
    """
    try:
        stated, _ = LlavaConfig.get_config_dict(source, revision=revision)
        if stated.get("model_type") != "llava" or not {"vision_config", "text_config"} <= stated.keys():
            raise ValueError("its config.json is not one of transformers' LlavaForConditionalGeneration")
        config: Any = LlavaConfig.from_dict(stated)
    except Exception as error:  # errors of hub, network and parsing have no common base
        raise ModelError(f"cannot start from '{source}': {error}") from error
    if differences := _differences(config):
        raise ModelError(f"cannot start from '{source}': {'; '.join(differences)}")

    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    encoder = {
        "config": config_fields(config.vision_config),
        "layer": config.vision_feature_layer,
        "select": "full" if config.vision_feature_select_strategy == "full" else "patch",
        **read_image_processor(source, revision),
    }
    options = TransformersEncoder.Options.model_validate(encoder)
    left_out = ("architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
    llm = {key: value for key, value in text.to_diff_dict().items() if key not in left_out}
    return LlavaParts(
        parts={
            "encoder": {"type": "hf", "options": encoder},
            "projector": {"type": "mlp", "options": {"depth": 2, "bias": config.multimodal_projector_bias}},
            "llm": {"type": "hf", "options": {"config": {"model_type": text.model_type, **llm}}},
        },
        tokenizer=source,
        facts={"image_token_id": config.image_token_id},
        state=lambda: _state(source, revision, text, options),
    )


def _differences(config: Any) -> list[str]:
    """Why our parts would not compute what this Llava computes."""
    vision, text = config.vision_config, config.text_config
    found = []
    if vision.model_type not in FAMILIES:
        found.append(f"its vision tower is a {vision.model_type}; known to work are {', '.join(FAMILIES)}")
    elif config.vision_feature_select_strategy == "default":
        prefix = FAMILIES[vision.model_type].cls_tokens + getattr(vision, "num_register_tokens", 0)
        if prefix != 1:
            found.append(f"strategy 'default' drops one token, but {prefix} of a {vision.model_type} are no patches")
    if not isinstance(config.vision_feature_layer, int):
        found.append(f"it joins several encoder layers (vision_feature_layer {config.vision_feature_layer})")
    if config.projector_hidden_act != "gelu":
        found.append(f"its projector has {config.projector_hidden_act} where ours has GELU")
    for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(text, name, None) not in (None, 1.0):
            found.append(f"Llava ignores `{name}` of its {text.model_type}, and the LLM by itself does not")
    return found


def _state(source: str, revision: str, text: Any, options: Any) -> dict[str, Tensor]:
    """Transformers' own loader reads the weights, because it knows all layouts; then they get our names."""
    llava, surplus = read_pretrained(LlavaForConditionalGeneration, source, revision=revision, dtype="auto")
    if surplus:
        raise ModelError(f"'{source}' has {len(surplus)} weights that are not Llava's: {', '.join(surplus[:8])} …")
    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(text)
        kept = {f"encoder.{name}" for name in TransformersEncoder(options, load_weights=False).state_dict()}
    head = next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())
    renamed = {
        "model.vision_tower.": "encoder.model.",
        "model.language_model.": f"llm.model.{causal.base_model_prefix}.",
        "lm_head.": f"llm.model.{head}.",
        **{f"model.multi_modal_projector.{theirs}": f"projector.{ours}" for theirs, ours in PROJECTOR_KEYS.items()},
    }
    state = {}
    for name, tensor in llava.state_dict().items():
        prefix = next(prefix for prefix in renamed if name.startswith(prefix))
        ours = renamed[prefix] + name.removeprefix(prefix)
        tied_head = prefix == "lm_head." and text.tie_word_embeddings
        if not tied_head and (prefix != "model.vision_tower." or ours in kept):
            state[ours] = tensor
    return state
