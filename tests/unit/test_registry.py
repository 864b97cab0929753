"""The catalogue and the way from names to classes: presets, suggestions, advice, and who is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from foveate.options import Options
from foveate.plugins import Plugins
from foveate.registry import Component, Registry, load_registry, packaged_registry, resolve
from tests.unit.recipe_parts import Accuracy, TinyEncoder, TinyProjector, tiny_plugins

CATALOGUE = """\
encoders:
  wide: {type: hf, width: 99, config: {layers: 4, heads: 2}}
  folder: {type: hf, pretrained: weights}
  broken: {type: hf, width: many}
  other: {type: no-such-type}
objectives:
  neat: {distribution: foveate-neat, summary: rebuilds neatly, paper: "2501.00001", install: pip install foveate-neat}
"""


@pytest.fixture
def context(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "registry.yaml").write_text(CATALOGUE)
    registry = Registry()
    assert registry.add_file(tmp_path / "registry.yaml") == []
    return {"folder": tmp_path, "plugins": tiny_plugins(), "registry": registry}


def refusal(kind: str, value: Any, context: dict[str, Any], **more: Any) -> str:
    """The one complaint about `value`: its key, and what is said."""
    with pytest.raises((ValidationError, PydanticCustomError)) as error:
        resolve(kind, value, context, **more)
    if isinstance(error.value, ValidationError):
        (line,) = error.value.errors()
        return f"{'.'.join(map(str, line['loc']))}: {line['msg']}"
    return str(error.value)


def test_a_name_is_a_preset_or_a_type(context: dict[str, Any]) -> None:
    wide = resolve("encoders", "wide", context)
    assert (wide.type, wide.cls, wide.preset) == ("hf", TinyEncoder, "wide")
    assert wide.options == TinyEncoder.Options(width=99, config={"layers": 4, "heads": 2})
    assert resolve("projectors", "mlp", context) == Component("mlp", TinyProjector, TinyProjector.Options())
    assert resolve("metrics", "accuracy", context).cls is Accuracy


def test_a_preset_can_be_changed_in_depth(context: dict[str, Any]) -> None:
    part = resolve("encoders", {"preset": "wide", "config": {"layers": 1}}, context)
    assert part.options == TinyEncoder.Options(width=99, config={"layers": 1, "heads": 2})
    assert resolve("encoders", part.resolved(), context) == Component("hf", TinyEncoder, part.options)


def test_a_mapping_has_a_type_or_the_default(context: dict[str, Any]) -> None:
    assert resolve("projectors", {"type": "mlp", "depth": 3}, context).options == TinyProjector.Options(depth=3)
    assert resolve("projectors", {"depth": 3}, context, default="mlp").options == TinyProjector.Options(depth=3)
    assert refusal("projectors", {"depth": 3}, context) == "type: say which projector: mlp"


@pytest.mark.parametrize("value", [None, 5, ["hf"], True])
def test_what_names_no_part(context: dict[str, Any], value: Any) -> None:
    assert refusal("encoders", value, context) == "must be a name or a mapping of options: which encoder?"


def test_unknown_names_bring_a_suggestion(context: dict[str, Any]) -> None:
    assert refusal("encoders", "wyde", context) == "type: unknown encoder 'wyde'; did you mean 'wide'?"
    assert refusal("encoders", {"preset": "wyde"}, context) == "preset: unknown preset 'wyde'; did you mean 'wide'?"
    assert refusal("projectors", "q-former", context) == "type: unknown projector 'q-former'; known: mlp"
    assert refusal("encoders", {"type": ["hf"]}, context).startswith("type: unknown encoder")
    assert refusal("encoders", {"preset": "wide", "type": "gone"}, context).startswith(
        "preset: preset 'wide' is of type 'hf'"
    )


def test_known_plugins_bring_advice(context: dict[str, Any]) -> None:
    advice = "'neat' (rebuilds neatly, arXiv 2501.00001) comes with foveate-neat: pip install foveate-neat"
    assert refusal("objectives", {}, context, default="neat") == f"type: unknown objective 'neat'. {advice}"
    assert (
        refusal("objectives", {}, context, default="neet")
        == f"type: unknown objective 'neet'; did you mean 'neat'? {advice}"
    )


def test_broken_plugins_are_named_and_shown_where_they_are_asked_for(context: dict[str, Any]) -> None:
    plugins: Plugins = context["plugins"]
    plugins.broken["foveate-neat (neat)"] = "Traceback …\n  line\nImportError: no flux"
    told = refusal("objectives", {}, context, default="neat")
    assert told.endswith(
        "The plugin foveate-neat (neat) is not available: Traceback …\n  line\nImportError: no flux"
    )
    told = refusal("encoders", "wyde", context)
    assert told.endswith("`foveate plugins` tells of 1 installed that cannot be used, such as foveate-neat (neat)")


def test_a_class_that_cannot_be_imported_is_the_plugins_error(context: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"encoder 'gone' of tiny-parts .*no_such_module_of_anybody"):
        resolve("encoders", "gone", context)


def test_options_are_checked_with_their_keys(context: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        resolve("encoders", {"type": "hf", "widht": 3, "width": "x"}, context)
    assert {line["loc"]: line["msg"] for line in error.value.errors()} == {
        ("width",): "must be a whole number, not 'x'",
        ("widht",): "unknown key 'widht'; did you mean 'width'?",
    }


def test_a_defective_preset_is_told_as_such(context: dict[str, Any]) -> None:
    assert refusal("encoders", "broken", context) == "preset 'broken': width: must be a whole number, not 'many'"
    assert refusal("encoders", {"preset": "broken", "width": 5, "depth": 1}, context).startswith(
        "depth: unknown key 'depth'"
    )
    assert (
        refusal("encoders", "other", context)
        == "type: unknown encoder 'no-such-type'; known: broken, folder, gone, hf, other, wide"
    )


def test_a_finished_component_passes(context: dict[str, Any]) -> None:
    part = Component("x", TinyEncoder, Options())
    assert resolve("encoders", part, context) is part


def test_catalogues_beside_a_recipe_add_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "registry.yaml").write_text(
            f"# {name}\nencoders:\n  mine-{name}: {{type: hf}}\n  twice: {{type: hf}}\n"
        )
    registry, problems = load_registry([tmp_path / "a", tmp_path / "b", tmp_path])
    assert {"mine-a", "mine-b", "dinov2-base"} <= registry.presets["encoders"].keys()
    assert [str(problem) for problem in problems] == [
        "b/registry.yaml:4:3: encoders.twice: 'twice' is in a/registry.yaml too; rename it"
    ]


def test_the_packaged_catalogue_beside_a_recipe_is_not_a_conflict(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_bytes(packaged_registry().read_bytes())
    assert load_registry([tmp_path, packaged_registry().parent])[1] == []


def test_defects_of_a_catalogue_are_all_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry.yaml").write_text("""\
encodrs: {a: {type: hf}}
llms: [a]
encoders:
  a: {width: 3}
  b: hf
  c: {type: hf}
  c: {type: hf}
objectives: {o: {distribution: d, summary: s, install: i, papr: p}}
""")
    problems = Registry().add_file(tmp_path / "registry.yaml")
    assert sorted(str(problem).split(": ")[1] for problem in problems) == [
        "encoders.a", "encoders.b", "encoders.c", "encodrs", "llms", "objectives.o"
    ]  # fmt: skip
