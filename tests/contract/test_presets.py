"""`registry.yaml`: every preset is a real architecture of the published size, and reads as options of its type."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from foveate import builtin
from foveate.data.templates import SHIPPED
from foveate.plugins import load_plugins
from foveate.recipe_file import template_names
from foveate.registry import load_registry, packaged_registry, resolve

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
}  # fmt: skip

VISUAL_TOKENS = {
    "clip-vit-base-patch16": 14, "clip-vit-large-patch14": 16, "clip-vit-large-patch14-336": 24,
    "siglip-base-patch16-224": 14, "siglip-so400m-patch14-384": 27,
    "siglip2-base-patch16-224": 14, "siglip2-so400m-patch14-384": 27,
    "dinov2-small": 37, "dinov2-base": 37, "dinov2-large": 37, "dinov2-giant": 37,
    "dinov2-with-registers-base": 37, "dinov2-with-registers-large": 37,
}  # fmt: skip


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


def test_templates_are_those_of_the_data_path() -> None:
    assert template_names() == {"chat", *SHIPPED}
