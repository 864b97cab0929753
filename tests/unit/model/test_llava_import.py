"""Reading stock Llava folders: the same visual tokens as transformers computes, from every layout of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from foveate.errors import ModelError
from foveate.model.encoder import TransformersEncoder
from foveate.model.llava import LlavaParts, read_llava
from foveate.model.projector import MLPProjector

torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
VISION: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **SMALL, "intermediate_size": 64},
    "siglip": {"model_type": "siglip_vision_model", **SMALL, "intermediate_size": 64},
    "dinov2": {"model_type": "dinov2", **SMALL, "mlp_ratio": 2, "use_swiglu_ffn": True},
}
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
}
TEXT_SHAPE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_SHAPE |= {"num_key_value_heads": 2, "vocab_size": 64}


def photos() -> Tensor:
    pictures = torch.stack([torch.from_numpy(picture.copy()) for picture in load_sample_images().images])
    square = pictures.permute(0, 3, 1, 2).float()[:, :, 100:340, 200:440]
    return torch.nn.functional.avg_pool2d(square, 10) / 127.5 - 1


def stock(vision: str = "clip", text: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=VISION[vision], text_config={**TEXT[text], **TEXT_SHAPE}, image_token_index=60,
        vision_feature_select_strategy="full" if vision == "siglip" else "default", **changes,
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in llava.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llava


def rebuild(parts: LlavaParts) -> tuple[TransformersEncoder, MLPProjector, Any]:
    """The three modules that `parts` describes, with its weights, every name accounted for."""
    options = {part: entry["options"] for part, entry in json.loads(json.dumps(parts.parts)).items()}
    state = parts.state()
    encoder = TransformersEncoder(TransformersEncoder.Options.model_validate(options["encoder"]), load_weights=False)
    config = dict(options["llm"]["config"])
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    projector = MLPProjector(
        MLPProjector.Options.model_validate(options["projector"]), encoder.spec.width, config["hidden_size"], (3, 3)
    )
    taken = 0
    for module, prefix in ((encoder, "encoder."), (projector, "projector."), (llm, "llm.model.")):
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        taken += len(own)
        left = module.load_state_dict(own, strict=False)
        assert not left.unexpected_keys
        assert left.missing_keys == (["lm_head.weight"] if module is llm and config["tie_word_embeddings"] else [])
        module.eval()
    assert taken == len(state)
    return encoder, projector, llm


def relayout(folder: Path, layout: str, llava: Any) -> None:
    """Rewrite a folder's weights as hub checkpoints have them, or as the modules are named today."""
    tied = llava.config.tie_word_embeddings
    state = {k: v.contiguous() for k, v in llava.state_dict().items() if not (tied and k == "lm_head.weight")}
    if layout == "legacy":
        renamed = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
        renamed |= {"model.multi_modal_projector.": "multi_modal_projector."}
        tower = "vision_tower." if llava.config.vision_config.model_type == "dinov2" else "vision_tower.vision_model."
        renamed |= {"model.vision_tower.": tower}
        for old, new in renamed.items():
            state = {k.replace(old, new, 1) if k.startswith(old) else k: v for k, v in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("layout", ["saved", "legacy", "new", "sharded"])
@pytest.mark.parametrize(("vision", "text"), [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "qwen2")])
def test_visual_tokens_and_llm_equal_the_stock_models(tmp_path: Path, vision: str, text: str, layout: str) -> None:
    llava = stock(vision, text)
    llava.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if layout == "sharded" else {}))
    if layout in ("legacy", "new"):
        relayout(tmp_path, layout, llava)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (layout == "sharded")

    parts = read_llava(str(tmp_path))
    encoder, projector, llm = rebuild(parts)
    with torch.no_grad():
        theirs = torch.stack(llava.get_image_features(photos()).pooler_output)
        assert torch.equal(projector(encoder(photos())), theirs)
        ids = torch.arange(1, 20)[None]
        assert torch.equal(llm(ids).logits, llava(ids).logits)
    assert len(encoder.blocks()) == 2
    assert (parts.tokenizer, parts.facts) == (str(tmp_path), {"image_token_id": 60})


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("vision", VISION)
def test_the_layer_is_llavas(tmp_path: Path, vision: str, layer: int) -> None:
    llava = stock(vision, vision_feature_layer=layer, multimodal_projector_bias=False)
    llava.save_pretrained(tmp_path)
    encoder, projector, _ = rebuild(read_llava(str(tmp_path)))
    with torch.no_grad():
        assert torch.equal(projector(encoder(photos())), torch.stack(llava.get_image_features(photos()).pooler_output))


def test_a_cls_token_that_llava_keeps_stays(tmp_path: Path) -> None:
    llava = stock("clip")
    llava.config.vision_feature_select_strategy = "full"
    llava.save_pretrained(tmp_path)
    encoder, projector, _ = rebuild(read_llava(str(tmp_path)))
    assert encoder.spec.grid == (1, 10)
    with torch.no_grad():
        assert torch.equal(projector(encoder(photos())), torch.stack(llava.get_image_features(photos()).pooler_output))


@pytest.mark.parametrize("vision", VISION)
def test_a_stock_llava_as_deep_as_our_encoder_computes_the_same(tmp_path: Path, vision: str) -> None:
    """What an export relies on: the cut encoder and ``vision_feature_layer=-1`` are the whole one at -2."""
    llava = stock(vision)
    llava.save_pretrained(tmp_path)
    encoder, _, _ = rebuild(read_llava(str(tmp_path)))
    options = encoder.portable_options()
    text = {**TEXT["llama"], **TEXT_SHAPE}
    strategy = llava.config.vision_feature_select_strategy
    config = LlavaConfig(
        vision_config=options["config"], text_config=text, image_token_index=60, vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    cut = LlavaForConditionalGeneration(config).eval()
    state = {k: v for k, v in llava.state_dict().items() if not k.startswith("model.vision_tower.")}
    state |= {k.replace("model.", "model.vision_tower.", 1): v for k, v in encoder.state_dict().items()}
    left = cut.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all("layernorm" in name for name in left.missing_keys)
    ids = torch.tensor([[1, 2, *[60] * 9, 3], [4, *[60] * 9, 5, 6]])
    with torch.no_grad():
        assert torch.equal(cut(ids, pixel_values=photos()).logits, llava(ids, pixel_values=photos()).logits)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_made_as_the_checkpoint_says(tmp_path: Path, file: str) -> None:
    stock().save_pretrained(tmp_path)
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / file).write_text(json.dumps(facts if file.startswith("pre") else {"image_processor": facts}))
    spec = rebuild(read_llava(str(tmp_path)))[0].spec
    assert (spec.mean, spec.std, spec.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)


def test_the_weights_keep_their_dtype_and_wait_to_be_asked_for(tmp_path: Path) -> None:
    stock().to(torch.bfloat16).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    aside = weights.rename(tmp_path / "aside")
    parts = read_llava(str(tmp_path))
    with pytest.raises(ModelError, match="cannot load the weights"):
        parts.state()
    aside.rename(weights)
    assert {tensor.dtype for tensor in parts.state().values()} == {torch.bfloat16}


def test_names_that_are_missing_or_left_over_are_listed(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({**state, "multi_modal_projector.linear_3.weight": torch.zeros(2)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"not Llava's.*linear_3\.weight"):
        read_llava(str(tmp_path)).state()
    save_file({k: v for k, v in state.items() if "linear_2.bias" not in k}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*linear_2\.bias"):
        read_llava(str(tmp_path)).state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "joins several encoder layers"),
        ({"projector_hidden_act": "relu"}, "relu where ours has GELU"),
        ({"vision_config": VISION["siglip"]}, "'default' drops one token, but 0 of a siglip_vision_model"),
        ({"vision_config": {**VISION["clip"], "model_type": "dinov2_with_registers"}}, "but 5 of a"),
        ({"vision_config": {"model_type": "vit"}}, "vision tower is a vit; known to work are"),
        ({"text_config": {"model_type": "granite", "logits_scaling": 8.0}}, "`logits_scaling`"),
        ({"model_type": "llama"}, "not one of transformers' LlavaForConditionalGeneration"),
        ({"vision_config": None}, "not one of transformers' LlavaForConditionalGeneration"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    stock().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ModelError, match=message):
        read_llava(str(tmp_path))


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot start from"):
        read_llava(str(tmp_path))
