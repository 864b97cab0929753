"""Encoders against transformers' own vision models and timm's own features, on real pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import image_utils

from foveate.errors import ModelError
from foveate.model.encoder import FAMILIES, TransformersEncoder
from foveate.model.timm_encoder import TimmEncoder

torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**SMALL, "intermediate_size": 64},
    "siglip_vision_model": {**SMALL, "intermediate_size": 64},
    "dinov2": {**SMALL, "mlp_ratio": 2, "layerscale_value": 0.5},
    "dinov2_with_registers": {**SMALL, "mlp_ratio": 2, "num_register_tokens": 3},
}
PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 4}
TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4}


def photos(size: int = 24) -> Tensor:
    """Two photographs as `[2, 3, size, size]`, values around 0."""
    pictures = torch.stack([torch.from_numpy(picture.copy()) for picture in load_sample_images().images])
    square = pictures.permute(0, 3, 1, 2).float()[:, :, 100 : 100 + 10 * size, 200 : 200 + 10 * size]
    return torch.nn.functional.avg_pool2d(square, 10) / 127.5 - 1


def reference(model_type: str) -> Any:
    """The stock model, weights spread enough that every part shows in the features."""
    torch.manual_seed(0)
    kind = FAMILIES[model_type].model
    model = kind(kind.config_class(**CONFIGS[model_type])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def build(load_weights: bool = True, **options: Any) -> TransformersEncoder:
    return TransformersEncoder(TransformersEncoder.Options.model_validate(options), load_weights).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Every family's stock model, and a folder that transformers saved it to."""
    found = {}
    for model_type in CONFIGS:
        folder = tmp_path_factory.mktemp(model_type)
        found[model_type] = (reference(model_type), folder)
        found[model_type][0].save_pretrained(folder)
    return found


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2])
def test_features_are_the_stock_models_hidden_states(
    folders: dict[str, tuple[Any, Path]], model_type: str, layer: int
) -> None:
    stock, folder = folders[model_type]
    with torch.no_grad():
        states = stock(photos(), output_hidden_states=True).hidden_states[layer]
        ours = build(pretrained=str(folder), layer=layer)(photos())
        whole = build(pretrained=str(folder), layer=layer, select="full")(photos())
    assert ours.shape == (2, 9, 32)
    assert torch.equal(ours, states[:, PREFIX[model_type] :])
    assert torch.equal(whole, states)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_nobody_reads_is_not_built(folders: dict[str, tuple[Any, Path]], model_type: str) -> None:
    stock, folder = folders[model_type]
    encoder = build(pretrained=str(folder))  # the default layer, -2
    family = FAMILIES[model_type]
    unread = (f"{family.blocks}.2.", family.norm, "head.", "embeddings.mask_token")
    expected = {name: tensor for name, tensor in stock.state_dict().items() if not name.startswith(unread)}
    ours = {name.removeprefix("model."): tensor for name, tensor in encoder.state_dict().items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert len(encoder.blocks()) == 2
    encoder(photos()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters()), "a parameter that is not read"


@pytest.mark.parametrize("model_type", CONFIGS)
def test_options_rebuild_the_encoder_without_its_folder(folders: dict[str, tuple[Any, Path]], model_type: str) -> None:
    encoder = build(pretrained=str(folders[model_type][1]), layer=1)
    options = json.loads(json.dumps(encoder.portable_options()))
    again = build(**options)
    again.load_state_dict(encoder.state_dict(), strict=True)
    assert torch.equal(again(photos()), encoder(photos()))
    assert again.spec == encoder.spec == TransformersEncoder.describe(again.Options.model_validate(options))


def test_a_whole_clip_checkpoint_gives_its_vision_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=CONFIGS["clip_vision_model"], text_config={**text, "vocab_size": 99})
    ).eval()
    clip.save_pretrained(tmp_path)
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts), encoding="utf-8")
    encoder = build(pretrained=str(tmp_path))
    with torch.no_grad():
        states = clip.vision_model(photos(), output_hidden_states=True).hidden_states[-2]
        assert torch.equal(encoder(photos()), states[:, 1:])
    assert (encoder.spec.mean, encoder.spec.std, encoder.spec.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)
    assert build(**encoder.portable_options()).spec == encoder.spec


@pytest.mark.parametrize("model_type", CONFIGS)
def test_pixels_are_stated_as_the_familys_image_processor_makes_them(model_type: str) -> None:
    spec = TransformersEncoder.describe(
        TransformersEncoder.Options(config={"model_type": model_type, **CONFIGS[model_type]})
    )
    family = {"clip_vision_model": "OPENAI_CLIP", "siglip_vision_model": "IMAGENET_STANDARD"}
    name = family.get(model_type, "IMAGENET_DEFAULT")
    assert spec.mean == tuple(getattr(image_utils, f"{name}_MEAN"))
    assert spec.std == tuple(getattr(image_utils, f"{name}_STD"))
    assert spec.resample == getattr(transformers, spec.image_processor)().resample
    assert (spec.grid, spec.width, spec.image_size) == ((3, 3), 32, 24)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_weights_that_are_missing_are_an_error(
    folders: dict[str, tuple[Any, Path]], tmp_path: Path, model_type: str
) -> None:
    source = folders[model_type][1]
    state = load_file(source / "model.safetensors")
    gone = next(name for name in state if "norm1" in name)
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ModelError, match="lacks 1 weights"):
        build(pretrained=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        build(pretrained=str(tmp_path))
    build(pretrained=str(tmp_path), load_weights=False)


def test_from_scratch_is_transformers_own_start_at_full_depth() -> None:
    config = {"model_type": "siglip_vision_model", **CONFIGS["siglip_vision_model"]}
    torch.manual_seed(7)
    encoder = build(config=config)
    torch.manual_seed(7)
    stock = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**CONFIGS["siglip_vision_model"], vision_use_head=False)
    ).eval()
    with torch.no_grad():
        assert torch.equal(encoder(photos()), stock(photos(), output_hidden_states=True).hidden_states[-1])


def test_bf16_and_recomputed_blocks() -> None:
    encoder = build(config={"model_type": "clip_vision_model", **CONFIGS["clip_vision_model"]})
    encoder(photos()).sum().backward()
    plain = [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]
    encoder.zero_grad()
    for block in encoder.blocks():
        forward = block.forward
        block.forward = lambda *args, run=forward, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
    encoder(photos()).sum().backward()
    again = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    half = build(config={"model_type": "clip_vision_model", **CONFIGS["clip_vision_model"]}).to(torch.bfloat16)
    assert half(photos()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give `pretrained`"),
        ({"config": {"model_type": "vit"}}, "no encoder 'vit'.*clip_vision_model"),
        ({"config": {"model_type": "siglip2_vision_model"}}, "NaFlex"),
        ({"config": {"model_type": "dinov2", "num_hiden_layers": 2}}, "no field num_hiden_layers"),
        ({"config": {"model_type": "siglip_vision_model", "hidden_size": "wide"}}, "hidden_size"),
        ({"pretrained": "./nowhere"}, "no such folder"),
        ({"pretrained": "some/id", "trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_wrong_options_are_refused_when_the_recipe_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransformersEncoder.Options.model_validate(options)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_pixels_after_the_last_whole_patch_are_not_read(model_type: str) -> None:
    """As in SigLIP so400m, 384 pixels with patches of 14."""
    encoder = build(config={"model_type": model_type, **CONFIGS[model_type], "image_size": 29})
    kind = FAMILIES[model_type].model
    stock = kind(kind.config_class(**{**CONFIGS[model_type], "image_size": 29})).eval()
    stock.load_state_dict({k.removeprefix("model."): v for k, v in encoder.state_dict().items()}, strict=False)
    with torch.no_grad():
        states = stock(photos(29), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(encoder(photos(29)), states[:, PREFIX[model_type] :])
    assert encoder.spec.grid == (3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 7}, "image_size is 7 and patch_size 8"),
        ({"image_size": (24, 32)}, "squares"),
        ({"num_channels": 1}, "num_channels 3"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
    ],
)
def test_shapes_that_cannot_be_encoders(changes: dict[str, Any], message: str) -> None:
    config = {"model_type": "siglip_vision_model", **CONFIGS["siglip_vision_model"], **changes}
    with pytest.raises(ModelError, match=message):
        TransformersEncoder.describe(TransformersEncoder.Options(config=config))


def test_layers_and_pixels_out_of_range() -> None:
    config = {"model_type": "dinov2", **CONFIGS["dinov2"]}
    for layer in (4, -5):
        with pytest.raises(ModelError, match=f"-4 to 3, not {layer}"):
            TransformersEncoder.describe(TransformersEncoder.Options(config=config, layer=layer))
    with pytest.raises(ModelError, match=r"\[I, 3, 24, 24\] and got \[2, 3, 32, 32\]"):
        build(config=config)(photos(32))


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read the architecture.*local folder"):
        TransformersEncoder.describe(TransformersEncoder.Options(pretrained=str(tmp_path)))
    transformers.ViTConfig(hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no encoder 'vit'"):
        TransformersEncoder.describe(TransformersEncoder.Options(pretrained=str(tmp_path)))


def timm_options(**options: Any) -> Any:
    plain = {"name": "vit_tiny_patch16_224", "image_size": 32, "args": {**TINY_VIT, "patch_size": 8}}
    return TimmEncoder.Options.model_validate({**plain, **options})


VITS = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]


@pytest.mark.parametrize("name", VITS)
def test_timm_features_are_its_intermediates(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    stock: Any = timm.create_model(name, img_size=32, patch_size=8, **TINY_VIT).eval()
    save_file(stock.state_dict(), tmp_path / "vit.safetensors")
    for layer, index in ((None, 1), (1, 0), (3, 2), (-1, 2)):
        options = timm_options(name=name, weights=str(tmp_path / "vit.safetensors"), layer=layer)
        encoder = TimmEncoder(options).eval()
        with torch.no_grad():
            theirs = stock.forward_intermediates(photos(32), indices=[index], intermediates_only=True)[0]
        ours = encoder(photos(32))
        assert ours.shape == (2, 16, 32)
        assert torch.equal(ours, theirs.flatten(2).transpose(1, 2))
        assert len(encoder.blocks()) == index + 1
        ours.square().sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters()), "a parameter that is not read"
        assert encoder.spec == TimmEncoder.describe(options)
        assert (encoder.spec.grid, encoder.spec.width, encoder.spec.image_size) == ((4, 4), 32, 32)
        assert encoder.spec.mean == stock.pretrained_cfg["mean"]
        again = TimmEncoder(TimmEncoder.Options.model_validate(json.loads(json.dumps(encoder.portable_options()))))
        again.load_state_dict(encoder.state_dict(), strict=True)
        assert again.spec == encoder.spec and torch.equal(again.eval()(photos(32)), ours)


def test_timm_weights_are_loaded_strictly(tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    stock = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, **TINY_VIT)
    state = stock.state_dict()
    save_file(state, file)
    encoder = TimmEncoder(timm_options(weights=str(file)))
    assert torch.equal(encoder.state_dict()["model.blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    save_file({name: tensor for name, tensor in state.items() if name != "blocks.0.mlp.fc1.weight"}, file)
    with pytest.raises(ModelError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        TimmEncoder(timm_options(weights=str(file)))
    with pytest.raises(ModelError, match="size mismatch"):
        save_file({**state, "cls_token": torch.zeros(1, 1, 48)}, file)
        TimmEncoder(timm_options(weights=str(file)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_tiny_patch61_224"}, "timm has no model 'vit_tiny_patch61_224'; near it"),
        ({"weights": __file__}, r"\.safetensors"),
    ],
)
def test_wrong_timm_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        timm_options(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet18", "image_size": None, "args": {}}, "resnet18.*vision transformer"),
        ({"name": "hiera_tiny_224", "image_size": None, "args": {}}, "hiera_tiny_224"),
        ({"name": "swin_tiny_patch4_window7_224", "image_size": None, "args": {}}, "swin_tiny"),
        ({"layer": 0}, "3 blocks"),
        ({"layer": 4}, "3 blocks"),
        ({"args": {"no_such_argument": 1}}, "no_such_argument"),
    ],
)
def test_timm_models_that_are_no_encoders(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TimmEncoder.describe(timm_options(**options))
