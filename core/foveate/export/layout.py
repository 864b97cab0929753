"""What an LMM is in transformers' words: why it is no stock Llava, its configuration, its weights by name.

Two layouts: a stock `LlavaForConditionalGeneration`, its weights named as those on the hub are, and our own subclass of
it (`modeling_foveate_llava.py`), its weights named as its modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, TimmWrapperConfig
from transformers.core_model_loading import revert_weight_conversion

from foveate.errors import ModelError
from foveate.export.modeling_foveate_llava import FoveateLlavaConfig, FoveateLlavaForConditionalGeneration
from foveate.model.encoder import FAMILIES, TransformersEncoder
from foveate.model.language import TransformersLLM
from foveate.model.llava import PROJECTOR_KEYS
from foveate.model.lmm import LMM
from foveate.model.projector import LinearProjector, MLPProjector, PixelShuffleProjector
from foveate.model.timm_encoder import TimmEncoder

MODELLING = "modeling_foveate_llava"
"""Our modelling file; it is copied into a folder with its own code."""

_AUTO_MAP = {
    "AutoConfig": f"{MODELLING}.{FoveateLlavaConfig.__name__}",
    "AutoModelForImageTextToText": f"{MODELLING}.{FoveateLlavaForConditionalGeneration.__name__}",
}


def not_stock(lmm: LMM) -> list[str]:
    """Why an LMM (weights are not looked at) cannot become a stock Llava; empty when it can."""
    reasons, encoder, projector, llm = not_exportable(lmm), lmm.encoder, lmm.projector, lmm.llm
    if isinstance(encoder, TimmEncoder):
        reasons.append("its encoder is timm's")
    elif isinstance(encoder, TransformersEncoder) and _unread(encoder) > 1:
        reasons.append(f"its encoder has {_unread(encoder)} features that are no patches; Llava can leave out one")
    options = projector.portable_options()
    if type(projector) in (LinearProjector, PixelShuffleProjector):
        name = "linear" if type(projector) is LinearProjector else "pixel_shuffle_mlp"
        reasons.append(f"its projector is {name}, not mlp of depth 2")
    elif type(projector) is MLPProjector and options["depth"] != 2:
        reasons.append(f"its projector is mlp of depth {options['depth']}, not 2")
    if options.get("normalize"):
        reasons.append("its visual tokens are normalized")
    if llm.logit_scale != 1:
        reasons.append(f"its LLM scales its logits by {llm.logit_scale:g}")
    if llm.head()[1] is not None:
        reasons.append("its LLM's head has a bias")
    return reasons


def not_exportable(lmm: LMM) -> list[str]:
    """Why an LMM cannot be exported at all, not even with code of its own."""
    ours: dict[str, tuple[type, ...]] = {
        "encoder": (TransformersEncoder, TimmEncoder),
        "projector": (LinearProjector, MLPProjector, PixelShuffleProjector),
        "llm": (TransformersLLM,),
    }
    reasons = [
        f"its {part} is a {type(getattr(lmm, part)).__name__}, which is a plugin's"
        for part, known in ours.items()
        if type(getattr(lmm, part)) not in known
    ]
    if type(lmm.llm) is TransformersLLM and not type(lmm.llm.model).__module__.startswith("transformers."):
        reasons.append(f"its LLM is a {type(lmm.llm.model).__name__}, whose code is not transformers'")
    if type(lmm.encoder) is TransformersEncoder and not lmm.encoder.blocks():
        reasons.append("its encoder has no block (layer 0), and transformers hands out no states of it")
    return reasons


def make_config(lmm: LMM, image_token_id: int, visual_grid: tuple[int, int], own_code: bool) -> Any:
    """The configuration of the export, without token ids of the text."""
    encoder, llm, options = lmm.encoder, lmm.llm, lmm.projector.portable_options()
    assert isinstance(llm, TransformersLLM) and isinstance(encoder, TransformersEncoder | TimmEncoder)
    tied = _tied(llm.model) and hasattr(llm.model.base_model, "embed_tokens")
    text = {**llm.portable_options()["config"], "use_cache": True, "tie_word_embeddings": tied}
    unread = _unread(encoder)
    given: dict[str, Any] = {
        "text_config": text,
        "image_token_index": image_token_id,
        "image_seq_length": math.prod(visual_grid),
        "vision_feature_layer": -1,  # only the blocks that are read were kept
        "vision_feature_select_strategy": "default" if unread == 1 else "full",
        "multimodal_projector_bias": options["bias"],
        "tie_word_embeddings": tied,
    }
    if not own_code:
        return LlavaConfig(vision_config=encoder.portable_options()["config"], **given)
    if isinstance(encoder, TimmEncoder):
        described = encoder.portable_options()
        size = {} if described["image_size"] is None else {"img_size": described["image_size"]}
        wrapper: Any = TimmWrapperConfig
        vision = wrapper(
            architecture=described["name"], model_args={**size, **described["args"]}, do_pooling=False,
            label_names=[], num_labels=0, hidden_size=encoder.spec.width, image_size=encoder.spec.image_size,
        )  # fmt: skip
        given["encoder_blocks"] = described["layer"]
    else:
        vision = encoder.portable_options()["config"]
        given["skipped_features"] = unread if unread > 1 else 0
    config: Any = FoveateLlavaConfig
    return config(
        vision_config=vision,
        projector_depth=options.get("depth", 1),
        projector_factor=options.get("factor", 1),
        projector_normalize=options["normalize"],
        logit_scale=llm.logit_scale,
        head_bias=llm.head()[1] is not None,
        auto_map=_AUTO_MAP,
        **given,
    )


def model_class(own_code: bool) -> Any:
    """The class that loads the export."""
    return FoveateLlavaForConditionalGeneration if own_code else LlavaForConditionalGeneration


def name_weights(lmm: LMM, config: Any, own_code: bool) -> dict[str, Tensor]:
    """The LMM's weights under the names that the folder gives them; a tied head has none.

    What transformers' tower has and nobody reads, and was therefore not kept, is filled in: its final norm, a mask
    token. Raises `ModelError` when the export has other weights, or others of another shape, than the LMM.
    """
    with torch.device("meta"):
        shell = model_class(own_code)(config)
    expected = dict(shell.state_dict())
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    state = {name: tensor.detach() for name, tensor in _renamed(lmm, own_code).items() if name in expected}
    placed = len(state) + config.tie_word_embeddings
    if isinstance(lmm.encoder, TransformersEncoder):
        unread = tuple(f"model.vision_tower.{name}" for name in (_family(lmm.encoder).norm, "embeddings.mask_token"))
        for name in expected.keys() - state.keys():
            if name.startswith(unread):
                fill = torch.ones if name.endswith("norm.weight") else torch.zeros
                state[name] = fill(expected[name].shape)
    wrong = sorted(
        expected.keys() ^ state.keys() | {name for name in state if state[name].shape != expected[name].shape}
    )
    if wrong or placed != len(lmm.state_dict()):
        raise ModelError(
            f"{len(lmm.state_dict()) - placed} weights of the model have no place in {type(shell).__name__}"
            + (f", and {len(wrong)} of its own do not fit: {', '.join(wrong[:4])}" if wrong else "")
        )
    return state if own_code else _as_on_the_hub(lmm, shell, state)


def _renamed(lmm: LMM, own_code: bool) -> dict[str, Tensor]:
    """The LMM's weights by the names of the export's modules; names without a place stay as they are."""
    assert isinstance(lmm.llm, TransformersLLM)
    causal = lmm.llm.model
    head = next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())
    projector = {"layers.": "layers."} if own_code else {ours: theirs for theirs, ours in PROJECTOR_KEYS.items()}
    timm = "timm_model." if isinstance(lmm.encoder, TimmEncoder) else ""
    prefixes = {
        "encoder.model.": f"model.vision_tower.{timm}",
        f"llm.model.{causal.base_model_prefix}.": "model.language_model.",
        f"llm.model.{head}.": "lm_head.",
        **{f"projector.{ours}": f"model.multi_modal_projector.{theirs}" for ours, theirs in projector.items()},
    }
    return _replace_prefixes(lmm.state_dict(), prefixes)


def _as_on_the_hub(lmm: LMM, shell: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the checkpoints of llava-hf: transformers makes them when it saves, all but one prefix."""
    assert isinstance(lmm.encoder, TransformersEncoder)
    # it took `vision_model` out of CLIP's and SigLIP's modules; it still reads it, and others read only it
    inner = "" if "dinov2" in lmm.encoder.model.config.model_type else "vision_model."
    return _replace_prefixes(revert_weight_conversion(shell, dict(state)), {"vision_tower.": f"vision_tower.{inner}"})


def _replace_prefixes(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    return renamed


def _tied(causal: Any) -> bool:
    return causal.get_output_embeddings().weight is causal.get_input_embeddings().weight


def _family(encoder: TransformersEncoder) -> Any:
    return FAMILIES[encoder.model.config.model_type]


def _unread(encoder: Any) -> int:
    """Leading features of transformers' tower that are no patches and that the model does not use."""
    if not isinstance(encoder, TransformersEncoder) or encoder.portable_options()["select"] == "full":
        return 0
    return _family(encoder).cls_tokens + getattr(encoder.model.config, "num_register_tokens", 0)
