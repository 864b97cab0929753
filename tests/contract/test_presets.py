"""`registry.yaml`: every preset is a real architecture of the published size, and reads as options of its type."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers import AutoencoderKL, VQModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from foveate import builtin
from foveate.data.templates import SHIPPED
from foveate.errors import ModelError
from foveate.objective import ObjectiveContext
from foveate.plugins import load_plugins
from foveate.recipe_file import template_names
from foveate.registry import load_registry, packaged_registry, resolve
from foveate.types import EncoderSpec

ROOT = Path(__file__).parents[2]
REGISTRY, PROBLEMS = load_registry()
PLUGINS = load_plugins([])
PLUGINS.add(builtin, "foveate")
PRESETS = [(kind, name) for kind in ("encoders", "llms") for name in REGISTRY.presets[kind]]

PUBLISHED = {
    # vision towers: timm's implementations have as many, but for DINOv2's mask token
    "clip-vit-base-patch16": 85_799_424, "clip-vit-large-patch14": 303_179_776,
    "clip-vit-large-patch14-336": 303_507_456,
    "siglip-base-patch16-224": 92_884_224, "siglip-so400m-patch14-384": 428_225_600,
    "siglip2-base-patch16-224": 92_884_224, "siglip2-so400m-patch14-384": 428_225_600,
    "dinov2-small": 22_056_576, "dinov2-base": 86_580_480, "dinov2-large": 304_368_640, "dinov2-giant": 1_136_480_768,
    "dinov2-with-registers-base": 86_583_552, "dinov2-with-registers-large": 304_372_736,
    # LLMs: as the hub counts their safetensors
    "qwen2-0.5b-instruct": 494_032_768, "qwen2-1.5b-instruct": 1_543_714_304, "qwen2-7b-instruct": 7_615_616_512,
    "qwen2.5-0.5b-instruct": 494_032_768, "qwen2.5-1.5b-instruct": 1_543_714_304, "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen2.5-7b-instruct": 7_615_616_512, "vicuna-7b-v1.5": 6_738_415_616, "vicuna-13b-v1.5": 13_015_864_320,
    "llama-3-8b-instruct": 8_030_261_248, "mistral-7b-instruct-v0.3": 7_248_023_552,
    # autoencoders: LDM's with four channels, as often told; FLUX's has 16, and no convolutions around its latents
    "sd-vae": 83_653_863, "flux-vae": 83_653_863 + 9 * 512 * 36 + 24 - 8 * 9 - 4 * 5,
    # their layouts, built independently, have as many (tests/plugins/ross); LlamaGen's paper says 72M
    "kl-16": 69_610_963, "vq-16": 71_883_403,
    # towers of timm, without their heads: 304.8M with DeiT's, 304.4M with CLIP's projection of EVA-02
    "deit3-large": 304_763_880 - 1025 * 1000, "eva02-clip-large": 304_432_832 - 1025 * 768,
}  # fmt: skip

VISUAL_TOKENS = {
    "clip-vit-base-patch16": 14, "clip-vit-large-patch14": 16, "clip-vit-large-patch14-336": 24,
    "siglip-base-patch16-224": 14, "siglip-so400m-patch14-384": 27,
    "siglip2-base-patch16-224": 14, "siglip2-so400m-patch14-384": 27,
    "dinov2-small": 37, "dinov2-base": 37, "dinov2-large": 37, "dinov2-giant": 37,
    "dinov2-with-registers-base": 37, "dinov2-with-registers-large": 37,
}  # fmt: skip


TEACHERS = {
    "flux-vae": (64, 384), "sd-vae": (16, 384), "kl-16": (16, 384), "vq-16": (8, 384),
    "dinov2-base": (768, 518), "dinov2-large": (1024, 518), "deit3-large": (1024, 384), "eva02-clip-large": (1024, 336),
}  # fmt: skip
"""Width of a target row, and side of the pictures in pixels, for a model of 24 x 24 visual tokens."""


def config(kind: str, name: str) -> Any:
    fields = dict(REGISTRY.presets[kind][name].options["config"])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def test_the_catalogue_is_sound() -> None:
    assert PROBLEMS == []
    assert packaged_registry() == ROOT / "registry.yaml"
    assert {"ross", "victor", "asvr"} <= REGISTRY.known["objectives"].keys()


def test_the_wheel_brings_the_catalogue() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert hatch["force-include"]["registry.yaml"] == "foveate/registry.yaml"


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_preset_has_the_published_size(kind: str, name: str) -> None:
    with torch.device("meta"):
        model = (AutoModel if kind == "encoders" else AutoModelForCausalLM).from_config(config(kind, name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_preset_says_nothing_that_transformers_does_not_know(kind: str, name: str) -> None:
    fields = REGISTRY.presets[kind][name].options["config"]
    unknown = fields.keys() - type(config(kind, name))().to_dict().keys()
    assert not unknown
    assert {key: getattr(config(kind, name), key) for key in fields} == dict(fields)


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_preset_is_read_by_its_type_and_needs_no_network(kind: str, name: str) -> None:
    part = resolve(kind, name, {"plugins": PLUGINS, "registry": REGISTRY})
    assert part.preset == name
    if kind == "encoders":
        side = VISUAL_TOKENS[name]
        assert part.cls.describe(part.options).grid == (side, side)


@pytest.mark.parametrize("name", REGISTRY.presets["teachers"])
def test_a_teacher_is_read_by_its_type_and_needs_no_network(name: str) -> None:
    chosen = resolve("teachers", name, {"plugins": PLUGINS, "registry": REGISTRY})
    assert chosen.preset == name
    encoder = EncoderSpec(336, (24, 24), 1024, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    spec = chosen.cls.describe(chosen.options, ObjectiveContext("some", 4096, 32, (24, 24), encoder))
    assert (spec.width, *spec.image_size) == (TEACHERS[name][0], TEACHERS[name][1], TEACHERS[name][1])
    assert spec.grid == (24, 24)


@pytest.mark.parametrize("name", ["flux-vae", "sd-vae", "kl-16", "vq-16"])
def test_an_autoencoder_has_the_published_size(name: str) -> None:
    options = REGISTRY.presets["teachers"][name].options
    with torch.device("meta"):
        model = (VQModel if options["type"] == "vq" else AutoencoderKL)(**options["config"])
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["deit3-large", "eva02-clip-large"])
def test_a_tower_of_timm_has_the_published_size_and_weights_on_the_hub(name: str) -> None:
    encoder = REGISTRY.presets["teachers"][name].options["encoder"]
    with torch.device("meta"):
        model = timm.create_model(encoder["name"], num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert timm.models.get_pretrained_cfg(encoder["name"]).hf_hub_id == f"timm/{encoder['name']}"


@pytest.mark.parametrize("name", ["kl-16", "vq-16"])
def test_what_is_to_be_imported_says_so_before_it_trains(name: str) -> None:
    chosen = resolve("teachers", name, {"plugins": PLUGINS, "registry": REGISTRY})
    encoder = EncoderSpec(336, (24, 24), 1024, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ModelError, match=r"https://.*foveate import teacher FILE FOLDER.*pretrained: FOLDER"):
        chosen.cls(chosen.options, ObjectiveContext("some", 4096, 32, (24, 24), encoder))


def test_latents_are_scaled_as_published() -> None:
    scales = {}
    for name in ("flux-vae", "sd-vae", "kl-16"):
        chosen = resolve("teachers", name, {"plugins": PLUGINS, "registry": REGISTRY})
        config = chosen.cls._config(chosen.options)
        scales[name] = config["shift_factor"], config["scaling_factor"]
    assert scales == {"flux-vae": (0.1159, 0.3611), "sd-vae": (None, 0.18215), "kl-16": (None, 0.2325)}


def test_templates_are_those_of_the_data_path() -> None:
    assert template_names() == {"chat", *SHIPPED}
