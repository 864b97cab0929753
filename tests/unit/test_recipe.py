"""The schema: shorthands, defaults, limits, and what one key's value allows of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from foveate.explain import each, said
from foveate.recipe import (
    DataSource,
    Hardware,
    LoraOptions,
    Model,
    Precision,
    Recipe,
    Section,
    Stage,
    TrainRule,
)
from foveate.registry import Component, Registry
from foveate.yaml_tree import Block
from tests.unit.recipe_parts import TinyData, TinyEncoder, tiny_plugins


@pytest.fixture
def context(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.json").write_text("[]")
    plugins = tiny_plugins()
    return {
        "folder": tmp_path,
        "plugins": plugins,
        "registry": Registry(),
        "objectives": {"neat"},
        "templates": {"chat"},
    }


STAGE = {
    "name": "align",
    "data": [Block({"path": "rows.json"})],
    "train": {"projector": 1e-3},
    "batch_size": 4,
    "max_steps": 2,
}


def complaints(model: type[Section], value: dict[str, Any], context: dict[str, Any] | None = None) -> dict[str, str]:
    with pytest.raises(ValidationError) as error:
        model.model_validate(value, context=context)
    return {".".join(map(str, line["loc"])): line["msg"] for line in error.value.errors()}


def stage(context: dict[str, Any], **changes: Any) -> Stage:
    return Stage.model_validate({**STAGE, **changes}, context=context)


def test_a_number_is_a_learning_rate(context: dict[str, Any]) -> None:
    rules = stage(context, train={"projector": 1e-3, "neat.head": {"lr": 2, "weight_decay": 0.1}}).train
    assert (rules["projector"].lr, rules["neat.head"].lr, rules["neat.head"].weight_decay) == (1e-3, 2.0, 0.1)


@pytest.mark.parametrize("rate", [0, -1e-3, "fast", float("nan"), float("inf"), None, [1]])
def test_what_is_no_learning_rate(context: dict[str, Any], rate: Any) -> None:
    assert list(complaints(Stage, {**STAGE, "train": {"llm": rate}}, context)) == ["train.llm.lr"]


@pytest.mark.parametrize("train", [{}, [], "llm", None])
def test_something_must_be_trained(context: dict[str, Any], train: Any) -> None:
    assert list(complaints(Stage, {**STAGE, "train": train}, context)) == ["train"]


def test_every_wrong_rule_is_told(context: dict[str, Any]) -> None:
    rules = {
        "lm": 1,
        "encoder.blocks": 1,
        "llm": {"lr": 1, "lora": {"r": 0}, "layers": "4"},
        "projector": {"lr": 1, "lora": {}},
    }
    assert complaints(Stage, {**STAGE, "train": rules}, context) == {
        "train.lm": "unknown part 'lm'; did you mean 'llm'?",
        "train.encoder.blocks": "unknown part 'encoder.blocks'; did you mean 'encoder'?",
        "train.llm.lora.r": "must be greater than 0, not 0",
        "train.llm.layers": "must be a slice of the blocks, such as '-4:' (the last four) or '0:12', not '4'",
        "train.projector.lora": "only encoder and llm can be trained by lora; leave it out here",
    }


@pytest.mark.parametrize("text", ["-4:", "0:12", ":-2", "3:", "-4:-1"])
def test_slices_of_blocks(text: str) -> None:
    assert TrainRule(lr=1, layers=text).layers == text


def test_lora_targets() -> None:
    assert LoraOptions().targets == "all-linear"
    assert LoraOptions.model_validate({"targets": ["q_proj", "v_proj"]}).targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("warmup", [0, 0.03, 1, 500])
def test_warmup_is_a_fraction_or_steps(context: dict[str, Any], warmup: float) -> None:
    assert stage(context, warmup=warmup).warmup == warmup


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"epochs": 1}, "max_steps"), ({"max_steps": None}, "max_steps"), ({"max_steps": 0}, "max_steps"),
        ({"epochs": 0, "max_steps": None}, "epochs"), ({"batch_size": -1}, "batch_size"), ({"clip": 0}, "clip"),
        ({"betas": [0.9, 1]}, "betas.1"), ({"max_bad_rate": 2}, "max_bad_rate"), ({"template": "chatt"}, "template"),
        ({"name": "../x"}, "name"), ({"name": "model"}, "name"), ({"data": []}, "data"),
        ({"schedule": "cos"}, "schedule"),
        ({"objectives": ["neat", "nat"]}, "objectives.1"), ({"weight_decay": float("inf")}, "weight_decay"),
    ],
)  # fmt: skip
def test_limits_of_a_stage(context: dict[str, Any], changes: dict[str, Any], key: str) -> None:
    assert list(complaints(Stage, {**STAGE, **changes}, context)) == [key]


def test_stages_have_names_of_their_own(context: dict[str, Any]) -> None:
    model = {"encoder": "hf", "projector": "mlp", "llm": {"config": {}}}
    recipe = {"name": "r", "model": model, "stages": [STAGE, STAGE, {**STAGE, "name": "b"}]}
    assert complaints(Recipe, recipe, context) == {
        "stages.1.name": "two stages are called 'align'; their names must differ"
    }


def test_a_source_is_flat_and_its_set_keeps_its_own_keys(context: dict[str, Any]) -> None:
    value = Block({"path": "rows.json", "weight": 2, "max_samples": 5, "objectives": ["neat"]})
    source = DataSource.model_validate(value, context=context)
    assert (source.dataset.cls, source.dataset.type) == (TinyData, "llava")
    assert (source.weight, source.max_samples, source.objectives) == (2.0, 5, ("neat",))
    assert source.dataset.options.path == context["folder"] / "rows.json"  # type: ignore[attr-defined]


def test_a_source_tells_everything_that_is_wrong(context: dict[str, Any]) -> None:
    value = Block({"path": "gone.json", "wieght": 2, "max_samples": 0})
    found = complaints(DataSource, value, context)
    assert {key.removeprefix("(dataset)."): message.partition(":")[0] for key, message in found.items()} == {
        "path": "no such file or folder",
        "wieght": "unknown key 'wieght'; did you mean 'weight'?",
        "max_samples": "must be greater than 0, not 0",
    }


def test_a_model_needs_all_parts_or_another_model(context: dict[str, Any]) -> None:
    assert list(complaints(Model, {"encoder": "hf"}, context)) == ["projector", "llm"]
    (context["folder"] / "run").mkdir()
    model = Model.model_validate({"from": "run", "projector": "mlp"}, context=context)
    assert (model.from_, model.encoder) == (str(context["folder"] / "run"), None)


def test_from_is_a_folder_or_a_hub_id(context: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = tmp_path / "work" / "runs" / "old"
    runs.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for name, expected in (
        ("runs/old", str(runs)),
        (str(runs), str(runs)),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
    ):
        assert Model.model_validate({"from": name}, context=context).from_ == expected
    for name in ("runs/new", "./x/y", "runs/old/model", "nothing"):
        assert complaints(Model, {"from": name}, context)["from"].startswith("no such folder: ")


def test_precision_by_name() -> None:
    assert Precision.model_validate("bf16") == Precision(compute="bf16", frozen="bf16", teachers="fp32")
    assert Precision.model_validate({"compute": "fp64"}).frozen == "fp64"
    assert Precision.model_validate({"frozen": "bf16"}) == Precision(compute="fp32", frozen="bf16")
    assert list(complaints(Precision, {"compute": "fp16"})) == ["compute"], "what follows from it is not told again"


def test_workers_follow_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, workers in ((1, 1), (2, 1), (16, 8), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        assert Hardware().workers == workers


@pytest.mark.parametrize("name", ["text", "llm", "a.b", ""])
def test_names_that_no_objective_may_have(context: dict[str, Any], name: str) -> None:
    found = complaints(Recipe, {"name": "r", "objectives": {name: {}}}, context)
    assert "cannot name an objective" in found[f"objectives.{name}"]


def test_recipes_are_immutable(context: dict[str, Any]) -> None:
    made = stage(context)
    with pytest.raises(ValidationError):
        made.batch_size = 3  # type: ignore[misc]
    assert isinstance(made.data, tuple) and isinstance(made.betas, tuple)


def test_sections_can_be_made_in_python() -> None:
    part = Component("hf", TinyEncoder, TinyEncoder.Options())
    model = Model(encoder=part, projector=part, llm=part)
    made = Stage(name="a", data=(DataSource(dataset=part),), train={"llm": TrainRule(lr=1)}, batch_size=1, max_steps=1)
    recipe = Recipe(name="r", model=model, stages=(made,))
    assert recipe.resolved()["stages"][0]["train"] == {
        "llm": {"lr": 1.0, "weight_decay": None, "lora": None, "layers": None}
    }


def test_each_collects_the_errors_of_all_entries() -> None:
    def check(key: str, value: int) -> int:
        if value < 0:
            raise said(f"{key} is negative")
        return value * 2

    assert each({"a": 1, "b": 2}, check) == {"a": 2, "b": 4}
    with pytest.raises(ValidationError) as error:
        each({"a": -1, "b": 2, "c": -3}, check)
    assert [(line["loc"], line["msg"]) for line in error.value.errors()] == [
        (("a",), "a is negative"),
        (("c",), "c is negative"),
    ]
