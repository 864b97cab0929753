"""Recipe files: every problem at once and in its place, `extends`, overrides, and the resolved recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from foveate.errors import RecipeError
from foveate.recipe import Recipe
from foveate.recipe_file import load_recipe
from tests.unit.recipe_parts import RECIPE, tiny_plugins

Read = Callable[..., Recipe]
Problems = Callable[..., list[str]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a file of the test's folder, which is the current folder; with `text`, writes it first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")

    def read(text: str | None = None, sets: Sequence[str] = (), name: str = "recipe.yaml") -> Recipe:
        if text is not None:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return load_recipe(name, sets, plugins=tiny_plugins(), templates={"chat", "plain"})

    return read


@pytest.fixture
def problems(read: Read) -> Problems:
    def problems(text: str | None = None, sets: Sequence[str] = (), name: str = "recipe.yaml") -> list[str]:
        with pytest.raises(RecipeError) as error:
            read(text, sets, name)
        assert error.value.exit_code == 2
        return error.value.problems

    return problems


def test_a_small_recipe(read: Read, tmp_path: Path) -> None:
    recipe = read(RECIPE)
    assert recipe.name == "recipe"
    assert recipe.output == tmp_path / "runs" / "recipe"
    assert recipe.stages[0].data[0].dataset.options.path == tmp_path / "rows.json"  # type: ignore[attr-defined]


def test_seven_errors_are_seven_problems(problems: Problems) -> None:
    found = problems("""\
seed: [3]
sed: 3
model:
  encoder: {width: 4}
  projector: mpl
  llm: {config: {}}
stages:
  - name: align
    data: [{path: missing.json}]
    train: {projektor: 1e-3}
    batch_size: 0
    batch_size: 4
    epochs: 1
""")
    assert [problem.split(": ", 2)[:2] for problem in found] == [
        ["recipe.yaml:1:1", "seed"],
        ["recipe.yaml:2:1", "sed"],
        ["recipe.yaml:5:3", "model.projector"],
        ["recipe.yaml:9:13", "stages.0.data.0.path"],
        ["recipe.yaml:10:13", "stages.0.train.projektor"],
        ["recipe.yaml:11:5", "stages.0.batch_size"],
        ["recipe.yaml:12:5", "stages.0.batch_size"],
    ]
    assert [problem.split(": ", 2)[2] for problem in found][:3] == [
        "must be a whole number, not [3]",
        "unknown key 'sed'; did you mean 'seed'?",
        "unknown projector 'mpl'; did you mean 'mlp'?",
    ]
    assert found[6].endswith("duplicate key 'batch_size' (first in line 11)")


def test_missing_keys_are_told_at_their_mapping(problems: Problems) -> None:
    assert problems("seed: 1\nmodel:\n  llm: {config: {}}\nstages:\n  - name: a\n    data: [{}]\n") == [
        "recipe.yaml:2:1: model.encoder: the required key 'encoder' is missing (or `from` another model)",
        "recipe.yaml:2:1: model.projector: the required key 'projector' is missing (or `from` another model)",
        "recipe.yaml:5:5: stages.0.batch_size: the required key 'batch_size' is missing",
        "recipe.yaml:5:5: stages.0.max_steps: give epochs or max_steps, the stage's length",
        "recipe.yaml:5:5: stages.0.train: the required key 'train' is missing",
        "recipe.yaml:6:12: stages.0.data.0.path: the required key 'path' is missing",
    ]
    assert problems("seed: 1\n") == [
        "recipe.yaml:1:1: model: the required key 'model' is missing",
        "recipe.yaml:1:1: stages: the required key 'stages' is missing",
    ]


def test_a_value_that_fits_no_branch_of_a_choice_is_one_problem(problems: Problems) -> None:
    assert problems(
        RECIPE + "    warmup: 1.5\n", ["model.projector={hidden: [a]}", "model.llm.tokenizer={vocab_size: 3}"]
    ) == [
        "--set model.llm.tokenizer={vocab_size: 3}: model.llm.tokenizer.vocab_size: "
        "must be greater than or equal to 300, not 3",
        "--set model.projector={hidden: [a]}: model.projector.hidden.0: must be a whole number, not 'a'",
        "recipe.yaml:11:5: stages.0.warmup: must be less than 1, not 1.5, or must be a whole number, not 1.5",
    ]


def test_one_defect_of_an_alias_is_one_problem(problems: Problems) -> None:
    text = RECIPE.replace("[{path: rows.json}]", "&rows [{path: gone.json}]") + "    validate: {data: *rows}\n"
    (problem,) = problems(text)
    assert problem.startswith("recipe.yaml:7:19: stages.0.data.0.path: no such file or folder: ")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "text\n"])
def test_what_is_no_recipe(problems: Problems, text: str) -> None:
    assert problems(text) == ["recipe.yaml:1:1: a recipe is a mapping with `model` and `stages`"]


def test_syntax_and_missing_files_are_one_problem(problems: Problems) -> None:
    (problem,) = problems("model: {encoder: [}\n")
    assert problem.startswith("recipe.yaml:1:19: YAML syntax: ")
    assert problems(name="none.yaml") == ["none.yaml: no such file or directory"]


# objectives: what is not registered is the catalogue's advice, once


def test_unknown_objectives_are_told_once(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("""\
objectives:
  neat: {distribution: foveate-neat, summary: rebuilds neatly, paper: "2501.00001", install: pip install foveate-neat}
""")
    text = RECIPE.replace("train: {", "objectives: [neat, naet, other]\n    train: {naet: 1, naet.head: 1, other: 1, ")
    found = problems("objectives:\n  neat: {weight: 1.0}\n  naet:\n" + text)
    advice = "'neat' (rebuilds neatly, arXiv 2501.00001) comes with foveate-neat: pip install foveate-neat"
    assert found == [
        f"recipe.yaml:2:3: objectives.neat: unknown objective 'neat'. {advice}",
        f"recipe.yaml:3:3: objectives.naet: unknown objective 'naet'; did you mean 'neat'? {advice}",
        "recipe.yaml:11:30: stages.0.objectives.2: the recipe has no objective 'other'; known: naet, neat",
        "recipe.yaml:12:36: stages.0.train.other: unknown part 'other'; known: encoder, llm, naet, neat, projector",
    ]


# extends


def test_extends_merges_mappings_and_replaces_the_rest(read: Read) -> None:
    read("seed: 1\nname: first\noutput: elsewhere\n" + RECIPE, name="first.yaml")
    read("extends: first.yaml\nseed: 2\nmodel: {encoder: {width: 6}}\nhardware: {workers: 0}\n", name="second.yaml")
    third = read("extends: second.yaml\nhardware: {prefetch: 5}\n", name="third.yaml")
    assert (third.seed, third.hardware.workers, third.hardware.prefetch) == (2, 0, 5)
    assert third.model.encoder is not None and third.model.encoder.options.width == 6  # type: ignore[attr-defined]
    assert (third.name, third.output.name) == ("third", "third"), "a recipe's run is its own"


def test_problems_stand_in_the_file_that_has_them(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("sed: 1\n" + RECIPE.replace("width", "widht"))
    assert problems("extends: base.yaml\nseed: x\nmodel: {encoder: {width: y}}\n") == [
        "base.yaml:1:1: sed: unknown key 'sed'; did you mean 'seed'?",
        "base.yaml:3:13: model.encoder.widht: unknown key 'widht'; did you mean 'width'?",
        "recipe.yaml:2:1: seed: must be a whole number, not 'x'",
        "recipe.yaml:3:19: model.encoder.width: must be a whole number, not 'y'",
    ]


def test_paths_and_catalogues_belong_to_the_file_they_stand_in(read: Read, tmp_path: Path) -> None:
    base = tmp_path / "shared"
    base.mkdir()
    (base / "rows.json").write_text("[]")
    (base / "pictures").mkdir()
    (base / "registry.yaml").write_text("encoders: {wide: {type: hf, width: 99}}")
    (base / "base.yaml").write_text(RECIPE.replace("{width: 4}", "wide"))
    recipe = read(
        "extends: ../shared/base.yaml\nevaluate: {data: [{path: ../rows.json}], metrics: [accuracy]}\n",
        name="own/r.yaml",
    )
    assert recipe.stages[0].data[0].dataset.options.path == base / "rows.json"  # type: ignore[attr-defined]
    assert recipe.evaluate is not None
    assert recipe.evaluate.data[0].dataset.options.path == tmp_path / "rows.json"  # type: ignore[attr-defined]
    assert recipe.model.encoder is not None and recipe.model.encoder.options.width == 99  # type: ignore[attr-defined]


def test_a_base_that_is_not_there_does_not_hide_or_invent_problems(problems: Problems) -> None:
    assert problems("extends: none.yaml\nseed: x\n") == [
        "recipe.yaml:1:1: extends: no such recipe: none.yaml",
        "recipe.yaml:2:1: seed: must be a whole number, not 'x'",
    ]
    assert problems("extends: 5\n") == ["recipe.yaml:1:1: extends: no such recipe: 5"]


TWO_STAGES = """\
model: {encoder: {width: 4}, projector: mlp, llm: {config: {}}}
objectives: {sharpen: {}, second: {type: sharpen}}
stages:
  - {name: align, data: [{path: rows.json, objectives: [sharpen]}], train: {projector: 1e-3, sharpen: 1e-3},
     batch_size: 4, objectives: [sharpen], epochs: 1}
  - {name: middle, data: [{path: rows.json}], train: {projector: 1e-4, second: 1e-4}, batch_size: 4, epochs: 1,
     frozen: [sharpen], objectives: [sharpen, second]}
  - {name: last, data: [{path: rows.json}], train: {projector: 1e-5, llm: 1, sharpen.head: 1}, frozen: [second],
     batch_size: 4, epochs: 1}
"""


def test_a_variant_changes_stages_by_name_and_takes_out_what_is_false(read: Read) -> None:
    read(TWO_STAGES, name="whole.yaml")
    twin = read("extends: whole.yaml\nobjectives: {sharpen: false}\nstages: {last: {batch_size: 7}, align: false}\n")
    assert [(stage.name, stage.batch_size, *stage.train) for stage in twin.stages] == [
        ("middle", 4, "projector", "second"), ("last", 7, "projector", "llm"),
    ]  # fmt: skip
    assert list(twin.objectives) == ["second"]
    assert (twin.stages[0].objectives, twin.stages[0].frozen) == (("second",), ())
    grandchild = read("extends: recipe.yaml\nobjectives: {second: {weight: 2}}\n", name="grandchild.yaml")
    assert len(grandchild.stages) == 2 and grandchild.objectives["second"].options.weight == 2  # type: ignore[attr-defined]
    frozen = read("extends: whole.yaml\nstages: {last: {train: {llm: false}}}\n", name="frozen.yaml")
    assert list(frozen.stages[2].train) == ["projector", "sharpen.head"] and len(frozen.objectives) == 2


def test_a_variant_by_overrides(read: Read) -> None:
    read(TWO_STAGES, name="whole.yaml")
    sets = ["objectives.sharpen=false", "objectives.second=false", "stages.middle=false", "stages.last.batch_size=9"]
    text_only = read(sets=sets, name="whole.yaml")
    assert (dict(text_only.objectives), [stage.batch_size for stage in text_only.stages]) == ({}, [4, 9])
    assert text_only.stages[0].data[0].objectives == ()
    middle = read("extends: whole.yaml\nobjectives: {second: false}\nstages: {middle: false, last: {frozen: []}}\n")
    assert list(middle.objectives) == ["sharpen"], "no stage that is left has named it"


def test_an_override_takes_out_only_what_is_there(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(TWO_STAGES)
    wrong = "--set objectives.sharp=false: objectives.sharp: there is no objective 'sharp' to take out"
    assert problems(sets=["objectives.sharp=false"], name="whole.yaml") == [f"{wrong}; did you mean 'sharpen'?"]


def test_problems_of_a_variant_stand_in_its_file(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(TWO_STAGES.replace("train: {projector: 1e-5", "train: {projcetor: 1e-5"))
    assert problems(
        "extends: whole.yaml\nobjectives: {sharpne: false}\nstages:\n  lats: {batch_size: 1}\n  middle: false\n"
        "  align:\n    batch_size: x\n    train: {llm: y}\n"
    ) == [
        "recipe.yaml:2:14: objectives.sharpne: there is no objective 'sharpne' to take out; did you mean 'sharpen'?",
        "recipe.yaml:4:3: stages.lats: there is no stage 'lats' to change; did you mean 'last'?",
        "recipe.yaml:7:5: stages.0.batch_size: must be a whole number, not 'x'",
        "recipe.yaml:8:13: stages.0.train.llm: must be a number, not 'y'",
        "whole.yaml:8:53: stages.1.train.projcetor: unknown part 'projcetor'; did you mean 'projector'?",
    ]


def test_recipes_must_not_extend_each_other_in_a_circle(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: recipe.yaml\n")
    assert problems("extends: a.yaml\n") == [
        "a.yaml:1:1: extends: the recipes extend each other in a circle: recipe.yaml → a.yaml → recipe.yaml"
    ]


# overrides


def test_overrides_are_yaml_and_win(read: Read) -> None:
    sets = [
        "stages.0.batch_size=16",
        "stages.0.train.projector=1e-4",
        "precision.compute=bf16",
        "model.llm.config={layers: 7}",
    ]
    recipe = read(RECIPE, [*sets, "stages.0.clip=", "stages.0.system=a=b"])
    stage = recipe.stages[0]
    assert (stage.batch_size, stage.train["projector"].lr, stage.clip, stage.system) == (16, 1e-4, None, "a=b")
    assert (recipe.precision.compute, recipe.precision.frozen) == ("bf16", "bf16")
    assert recipe.model.llm is not None and recipe.model.llm.options.config == {"layers": 7}  # type: ignore[attr-defined]


def test_paths_of_overrides_are_relative_to_the_current_folder(read: Read, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.json").write_text("[]")
    recipe = read(RECIPE, ["stages.0.data.0.path=rows.json"], name="sub/recipe.yaml")
    assert recipe.stages[0].data[0].dataset.options.path == tmp_path / "rows.json"  # type: ignore[attr-defined]


def test_wrong_overrides_are_told_with_their_text(problems: Problems) -> None:
    assert problems(
        RECIPE,
        ["stages.0.batchsize=8", "hardwear.workers=2", "stages.2.name=x", "seed.x=1", "seed", "seed=[", "name=a/b"],
    ) == [
        "--set hardwear.workers=2: hardwear: unknown key 'hardwear'; did you mean 'hardware'?",
        "--set name=a/b: name: 'a/b' cannot name a folder of the run: letters, digits, space and _ . + -; "
        "not model, teachers",
        "--set seed: write key=value, such as stages.0.batch_size=8",
        "--set seed=[: seed: YAML syntax: expected the node content, but found '<stream end>'",
        "--set stages.0.batchsize=8: stages.0.batchsize: unknown key 'batchsize'; did you mean 'batch_size'?",
        "--set stages.2.name=x: stages.2.name: there is no '2' in a list of 1; entries count from 0",
    ]


def test_an_override_inside_of_a_value_is_refused(problems: Problems) -> None:
    (problem,) = problems(RECIPE, ["model.projector.depth=3"])
    assert problem.endswith(
        "model.projector.depth: 'depth' cannot be set inside of 'mlp', which is no mapping; set the whole"
    )


# the resolved recipe, and parts that cannot be imported


def test_the_resolved_recipe_reads_as_the_same_recipe(read: Read, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("encoders: {wide: {type: hf, width: 99, config: {a: 1, b: {c: 2}}}}")
    (tmp_path / "source").mkdir()
    train = "{llm: {lr: 1e-4, layers: '-1:', lora: {targets: [q_proj]}}, projector: 1e-3}"
    text = RECIPE.replace("{projector: 1e-3}", train).replace("{width: 4}", "{preset: wide, config: {b: {d: 3}}}")
    recipe = read(
        text.replace("model:", "model:\n  from: source")
        + """\
    clip: null
    warmup: 10
    validate: {data: [{path: rows.json}], every: 5}
evaluate: {data: [{path: rows.json, weight: 2, max_samples: 4}], metrics: [accuracy], template: plain}
precision: bf16
text: {weight: 0.5}
trackers: [tensorboard]
"""
    )
    resolved = recipe.resolved()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "again.yaml").write_text(yaml.safe_dump(resolved))
    again = load_recipe(other / "again.yaml", plugins=tiny_plugins())
    assert again.resolved() == resolved
    assert resolved["model"]["encoder"]["config"] == {"a": 1, "b": {"c": 2, "d": 3}}
    assert resolved["model"]["from"] == str(tmp_path / "source")
    assert resolved["evaluate"]["data"][0] == {
        "type": "llava", "path": str(tmp_path / "rows.json"), "images": None,
        "weight": 2.0, "max_samples": 4, "objectives": None,
    }  # fmt: skip


def test_a_registered_part_that_cannot_be_imported_is_an_error_of_its_plugin(read: Read) -> None:
    with pytest.raises(RecipeError, match=r"model\.encoder.*: encoder 'gone' of tiny-parts"):
        read(RECIPE, ["model.encoder=gone"])
