"""Objectives in the loop: what changes no gradient, what sits out, what is saved, fitted, resumed and refused."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from foveate.data_room import DataRoom
from foveate.errors import FoveateError, PluginError, TrainingError
from foveate.model.build import blueprint
from foveate.objective import LossTerm, ObjectiveContext, ObjectiveOptions, TeacherInputs, VisionObjective
from foveate.plan import make_plan
from foveate.progress import Display
from foveate.recipe_fields import TeacherChoice
from foveate.recipe_file import load_recipe
from foveate.run import Run
from foveate.session import Interrupted
from foveate.targets import TeacherRoom
from foveate.training import train
from foveate.types import EncoderSpec
from tests.corpus import recipe_dict, write_recipe
from tests.objectives import ALL, Noisy, Queries, plugins_with

OBJECTIVES: dict[str, Any] = {
    "noisy": {"shift": 1, "weight": 0.5},
    "second": {"type": "noisy", "layers": [1], "probability": 0.5},
    "masked": {"wish": "causal"},
    "queries": {"tokens": 2},
}
GROUPS: dict[str, Any] = {"masked": {"wish": "groups"}, "noisy": {}, "queries": {"tokens": 1}}
TRAIN = {"encoder": 1e-3, "projector": 1e-3, "llm": 1e-3}


def run(
    folder: Path, corpus: Path, objectives: Mapping[str, Any], *, resume: bool = False,
    types: Mapping[str, type] | None = None, **changes: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor], Run]:  # fmt: skip
    """Train `changes` of one stage with objectives; lines of metrics, all weights, the run."""
    folder.mkdir(exist_ok=True)
    changes |= {"objectives": changes.pop("active")} if "active" in changes else {}
    top = {key: changes.pop(key) for key in ("precision", "hardware", "checkpoint_every", "model") if key in changes}
    stage = {**recipe_dict(corpus)["stages"][0], "train": {**TRAIN, **dict.fromkeys(objectives, 1e-2)}, **changes}
    recipe = recipe_dict(corpus, output=str(folder / "run"), objectives=dict(objectives), stages=[stage], **top)
    loaded = load_recipe(write_recipe(folder, recipe), plugins=plugins_with({**ALL, **(types or {})}))
    result = train(loaded, resume=resume, display=Display(quiet=True))
    weights = {f"{path}": tensor for path, tensor in _weights(result.folder / "model").items()}
    return result.metrics(), weights, result


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.parent.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    """Losses, metrics and weights, to 1e-9."""
    assert len(first[0]) == len(second[0])
    for line, other in zip(first[0], second[0], strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"step_seconds", "data_wait", "stage"}:
            assert other[key] == pytest.approx(line[key], rel=1e-9, abs=1e-12), key
    assert first[1].keys() == second[1].keys()
    for name, weight in first[1].items():
        torch.testing.assert_close(second[1][name], weight, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("objectives", [OBJECTIVES, GROUPS], ids=["shift", "groups"])
def test_token_budget_changes_nothing_in_float64(
    tmp_path: Path, shared_corpus: Path, objectives: dict[str, Any]
) -> None:
    """Shift, two of one type, an editor with groups of attention, extra tokens with a teacher; text-only rows too."""
    results = [
        run(
            tmp_path / str(budget), shared_corpus, objectives, max_steps=8,
            precision={"compute": "fp64", "teachers": "fp64"},
            hardware={"workers": 0, "tokens_per_microbatch": budget},
        )
        for budget in (100_000, 150, 1)
    ]  # fmt: skip
    lines = results[0][0]
    assert {"loss/noisy", "loss/masked", "loss/queries", "noisy/error", "lr/queries"} <= lines[0].keys()
    if "second" in objectives:
        assert 0 < sum("loss/second" in line for line in lines) < len(lines), "probability 0.5 gates some steps"
    same(results[0], results[1])
    same(results[0], results[2])


def test_another_objective_changes_no_random_draw(tmp_path: Path, shared_corpus: Path) -> None:
    """With frozen LMM and independent heads, a run with a second objective gives the first the same losses."""
    alone = run(tmp_path / "a", shared_corpus, {"noisy": {}}, train={"noisy": 1e-2}, clip=None)[0]
    options = {"noisy": {}, "other": {"type": "noisy"}}
    both = run(tmp_path / "b", shared_corpus, options, train={"noisy": 1e-2, "other": 1e-2}, clip=None)[0]
    assert [line["loss/noisy"] for line in both] == pytest.approx([line["loss/noisy"] for line in alone], rel=1e-6)
    assert both[0]["loss/noisy"] != both[0]["loss/other"]


def test_heads_are_saved_apart_and_found_again(tmp_path: Path, shared_corpus: Path) -> None:
    _, weights, first = run(tmp_path / "a", shared_corpus, {"noisy": {}, "queries": {}})
    heads = first.folder / "model" / "objectives"
    assert sorted(path.name for path in heads.iterdir()) == ["noisy", "queries"]
    lmm = {name for path in (first.folder / "model").glob("*.safetensors") for name in load_file(path)}
    assert {name.split(".")[0] for name in lmm} == {"encoder", "projector", "llm"}
    assert set(load_file(heads / "queries" / "weights.safetensors")) == {"queries", "head.weight", "head.bias"}
    assert json.loads((heads / "noisy" / "objective.json").read_text())["type"] == "noisy"
    model = {"from": str(first.folder)}
    changes: dict[str, Any] = {"train": {"projector": 1e-3}, "frozen": ["noisy"], "max_steps": 1, "model": model}
    _, again, _ = run(tmp_path / "b", shared_corpus, {"noisy": {}}, **changes)
    torch.testing.assert_close(again["noisy:head.weight"], weights["noisy:head.weight"])
    _, fresh, _ = run(tmp_path / "c", shared_corpus, {"noisy": {"from_model": False}}, **changes)
    assert not torch.allclose(fresh["noisy:head.weight"], weights["noisy:head.weight"])


def test_learning_rate_by_sub_part_and_frozen_by_omission(tmp_path: Path, shared_corpus: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 3, "schedule": "constant", "warmup": 0}
    trained = {**TRAIN, "queries.head": 1e-2, "queries.queries": 1e-3}
    lines, whole, _ = run(tmp_path / "a", shared_corpus, {"queries": {}}, train=trained, **changes)
    assert (lines[0]["lr/queries.head"], lines[0]["lr/queries.queries"]) == (1e-2, 1e-3)
    _, partly, _ = run(tmp_path / "b", shared_corpus, {"queries": {}}, train={**TRAIN, "queries.head": 1e-2}, **changes)
    _, start, _ = run(tmp_path / "c", shared_corpus, {"queries": {}}, train=TRAIN, frozen=["queries"], **changes)
    assert torch.equal(partly["queries:queries"], start["queries:queries"])
    assert not torch.equal(partly["queries:head.weight"], start["queries:head.weight"])
    assert not torch.equal(whole["queries:queries"], start["queries:queries"])


def test_a_stopped_run_resumes_bit_by_bit(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = {**OBJECTIVES, "queries": {"fit": True}}
    unbroken, weights, _ = run(tmp_path / "a", shared_corpus, objectives, max_steps=5)
    loss = Noisy.loss

    def interrupting(self: Noisy, outputs: Any, *others: Any) -> LossTerm:
        if outputs._moment.step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(self, outputs, *others)

    monkeypatch.setattr(Noisy, "loss", interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", shared_corpus, objectives, max_steps=5)
    monkeypatch.undo()
    resumed, again, result = run(tmp_path / "b", shared_corpus, objectives, max_steps=5, resume=True)
    times = ("step_seconds", "data_wait")
    strip = [[{key: line[key] for key in line if key not in times} for line in lines] for lines in (unbroken, resumed)]
    assert strip[0] == strip[1]
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    fit = json.loads((result.folder / "teachers" / "queries" / "fit.json").read_text())
    assert 0 < fit["told"]["scale"] < 1


def test_a_fitted_teacher_keeps_the_encoder_that_it_was_fitted_with(tmp_path: Path, shared_corpus: Path) -> None:
    """Its targets are those of the encoder at the time of the fit: frozen while the model's moves."""
    seen: list[list[Tensor]] = []

    class Recorded(ALL["queries"]):  # type: ignore[misc,name-defined]
        def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
            seen.append([record["values"] for record in targets])
            return super().loss(outputs, targets, state)

    options = {"q": {"type": "recorded", "fit": True, "encoder": True}}
    changes: dict[str, Any] = {"types": {"recorded": Recorded}, "max_steps": 4, "batch_size": 48, "epochs": None}
    changes["data"] = [{**recipe_dict(shared_corpus)["stages"][0]["data"][0]}]
    run(tmp_path / "a", shared_corpus, options, **changes)
    _, *sums = [sum(float(value.sum()) for value in values) for values in seen]
    assert len(sums) == 4 and sums[0] == pytest.approx(sums[3], rel=1e-4), "every step shows the whole corpus"


def test_an_encoder_that_is_trained_is_no_teacher(tmp_path: Path, shared_corpus: Path) -> None:
    options = {"queries": {"encoder": True}}
    with pytest.raises(FoveateError, match="stage only: the teacher of 'queries' reads the encoder, which"):
        run(tmp_path / "a", shared_corpus, options)
    run(tmp_path / "b", shared_corpus, options, train={"projector": 1e-3, "queries": 1e-3}, max_steps=2)


def test_active_but_frozen_is_an_error(tmp_path: Path, shared_corpus: Path) -> None:
    with pytest.raises(FoveateError, match="'noisy' is active and nothing of it is trained"):
        run(tmp_path / "a", shared_corpus, {"noisy": {}}, train=TRAIN)


def test_trained_but_inactive_is_an_error(tmp_path: Path, shared_corpus: Path) -> None:
    with pytest.raises(FoveateError, match="'noisy' is not active in this stage"):
        run(tmp_path / "a", shared_corpus, {"noisy": {}, "queries": {}}, active=["queries"])


def test_a_state_before_a_token_that_has_seen_it_is_an_error(tmp_path: Path, shared_corpus: Path) -> None:
    with pytest.raises(FoveateError, match="'noisy' reads the state before each visual token"):
        run(tmp_path / "a", shared_corpus, {"noisy": {"shift": 1}, "masked": {"wish": "image_bidirectional"}})


def test_conflicting_wishes_are_told_before_training(tmp_path: Path, shared_corpus: Path) -> None:
    options = {"masked": {}, "other": {"type": "masked", "wish": "image_bidirectional"}}
    with pytest.raises(FoveateError, match="'masked' groups, 'other' image_bidirectional"):
        run(tmp_path / "a", shared_corpus, options)
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize("wish", ["causal", "image_bidirectional", "prefix_bidirectional", "groups"])
def test_every_wish_trains(tmp_path: Path, shared_corpus: Path, wish: str) -> None:
    lines, _, _ = run(tmp_path / "a", shared_corpus, {"masked": {"wish": wish}}, max_steps=2)
    assert lines[-1]["masked/edited"] == pytest.approx(0.5, abs=0.2)


def test_sources_say_which_objectives_apply(tmp_path: Path, shared_corpus: Path) -> None:
    source = recipe_dict(shared_corpus)["stages"][0]["data"][0]
    lines, _, _ = run(
        tmp_path / "a", shared_corpus, {"noisy": {}, "queries": {}},
        data=[{**source, "objectives": ["queries"]}], frozen=["noisy"], train={**TRAIN, "queries": 1e-3},
    )  # fmt: skip
    assert all("loss/noisy" not in line and "loss/queries" in line for line in lines)


def test_schedules_gate_steps_and_optimizer(tmp_path: Path, shared_corpus: Path) -> None:
    options = {"noisy": {"start_step": 2, "end_step": 4}}
    changes: dict[str, Any] = {"weight_decay": 0.1, "train": {**TRAIN, "noisy": 1e-2}, "checkpoint_every": 1}
    lines, _, _ = run(tmp_path / "a", shared_corpus, options, max_steps=6, **changes)
    assert [line["step"] for line in lines if "loss/noisy" in line] == [3, 4]


def test_what_an_objective_raises_names_it(tmp_path: Path, shared_corpus: Path) -> None:
    class Broken(Noisy):
        def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
            raise IndexError("seven")

    with pytest.raises(PluginError, match=r"objective 'x' failed in .*Broken\.loss: IndexError: seven"):
        run(tmp_path / "a", shared_corpus, {"x": {"type": "broken"}}, types={"broken": Broken})


def test_a_loss_that_is_not_finite_names_objective_and_samples(tmp_path: Path, shared_corpus: Path) -> None:
    class Infinite(Noisy):
        def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
            return LossTerm(super().loss(outputs, targets, state).total / 0.0)

    with pytest.raises(TrainingError, match="the loss of 'x' is not finite in stage only, step 1; samples: "):
        run(tmp_path / "a", shared_corpus, {"x": {"type": "infinite"}}, types={"infinite": Infinite})


def test_an_edit_in_place_is_an_error(tmp_path: Path, shared_corpus: Path) -> None:
    class InPlace(ALL["masked"]):  # type: ignore[misc,name-defined]
        def edit_visual_tokens(self, inputs: Any) -> Any:
            inputs.tokens[:2] = 0.0
            return super().edit_visual_tokens(inputs)

    with pytest.raises(PluginError, match="edits the visual tokens in place"):
        run(tmp_path / "a", shared_corpus, {"x": {"type": "inplace"}}, types={"inplace": InPlace})


def test_a_teacher_that_is_a_sub_module_is_an_error(tmp_path: Path, shared_corpus: Path) -> None:
    class Keeper(ALL["queries"]):  # type: ignore[misc,name-defined]
        def build_teacher(self) -> Any:
            self.teacher = super().build_teacher()
            return self.teacher

    with pytest.raises(PluginError, match="'x' keeps its teacher as a sub-module"):
        run(tmp_path / "a", shared_corpus, {"x": {"type": "keeper"}}, types={"keeper": Keeper})


def test_after_step_and_validation(tmp_path: Path, shared_corpus: Path) -> None:
    steps: list[int] = []

    class Counting(Noisy):
        def after_step(self, step: int, statistics: Any) -> None:
            steps.append(step)

    source = recipe_dict(shared_corpus)["stages"][0]["data"][0]
    lines, _, _ = run(
        tmp_path / "a", shared_corpus, {"x": {"type": "counting", "start_step": 1}, "masked": {}},
        types={"counting": Counting}, max_steps=3, validate={"data": [{**source, "max_samples": 8}]},
    )  # fmt: skip
    assert steps == [1, 2]
    assert {"valid/loss/text", "valid/loss/x", "valid/loss/masked"} <= lines[-1].keys()


def test_a_batch_dependent_objective_is_told_in_the_plan(tmp_path: Path, shared_corpus: Path) -> None:
    class Contrastive(Noisy):
        batch_dependent = True

    assert VisionObjective.role == "input" and not VisionObjective.batch_dependent
    for name, cls in (("noisy", Noisy), ("contrastive", Contrastive)):
        content = recipe_dict(shared_corpus, objectives={"x": {"type": name}})
        content["stages"][0]["train"] = {**TRAIN, "x": 1e-3}
        recipe = load_recipe(write_recipe(tmp_path, content), plugins=plugins_with({name: cls}))
        warnings = make_plan(recipe, DataRoom(recipe, blueprint(recipe.model))).warnings
        assert any("objective x compares images of a micro-batch" in text for text in warnings) == (cls is Contrastive)


def test_a_fit_draws_from_no_global_generator() -> None:
    """A resumed run does not fit again, and must go on with the same draws."""
    seen: list[Tensor] = []

    class Drawing(Queries):
        def fit_teacher(self, teacher: Any, batches: Any) -> Any:
            seen.append(torch.randn(5))
            return super().fit_teacher(teacher, batches)

    spec = EncoderSpec(8, (2, 2), 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for seed in (0, 1):
        torch.manual_seed(seed)
        room = TeacherRoom({"q": Drawing(Drawing.Options(fit=True), ObjectiveContext("q", 8, 2, (2, 2), spec))})
        before = torch.get_rng_state()
        assert room.fit("q", lambda: [TeacherInputs([], [{"small": torch.full((4,), 0.5)}])] * 3)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seen[0], seen[1])


def test_statistics_reach_after_step_and_what_init_froze_stays(tmp_path: Path, shared_corpus: Path) -> None:
    """Sums over the step's micro-batches, whatever the token budget; a frozen average moves by after_step alone."""

    class Centred(Noisy):
        def __init__(self, options: Any, context: Any):
            super().__init__(options, context)
            self.slow = torch.nn.Parameter(self.head.weight.detach().clone(), requires_grad=False)
            self.register_buffer("centre", torch.zeros(context.llm_width))

        def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
            term = super().loss(outputs, targets, state)
            rows = outputs.states().detach()
            return LossTerm(term.total, term.metrics, {"sum": rows.sum(0), "rows": torch.tensor(float(len(rows)))})

        def after_step(self, step: int, statistics: Any) -> None:
            self.centre.copy_(statistics["sum"] / statistics["rows"])
            self.slow.lerp_(self.head.weight, 0.5)

    results = [
        run(
            tmp_path / str(budget), shared_corpus, {"x": {"type": "centred"}}, types={"centred": Centred}, max_steps=3,
            precision="fp64", hardware={"workers": 0, "tokens_per_microbatch": budget},
        )
        for budget in (100_000, 1)
    ]  # fmt: skip
    same(results[0], results[1])
    assert results[0][1]["x:centre"].abs().sum() > 0
    assert not torch.equal(results[0][1]["x:slow"], results[0][1]["x:head.weight"])


def test_an_objective_that_changes_its_targets_shares_no_teacher(tmp_path: Path, shared_corpus: Path) -> None:
    class Base(VisionObjective):
        class Options(ObjectiveOptions):
            teacher: TeacherChoice = Field({"type": "patches", "patch_px": 2}, description="What is regressed.")

        def __init__(self, options: Any, context: Any):
            super().__init__(options, context)
            self.head = torch.nn.Linear(context.llm_width, self.teacher_spec.width)

        def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
            return LossTerm((self.head(outputs.states()) - targets.rows()).square().sum())

    class Brighter(Base):
        def encode_target(self, teacher: Any, inputs: Any) -> Any:
            return [{key: value + 100 for key, value in record.items()} for record in teacher.encode(inputs)]

    types = {"base": Base, "brighter": Brighter}
    line = run(tmp_path / "a", shared_corpus, {"base": {}, "brighter": {}}, types=types, max_steps=1)[0][0]
    assert line["loss/brighter"] > 100 * line["loss/base"]


def test_a_run_resumed_at_its_end_finds_its_fitted_teachers(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left to do, the report, draws with the teacher that was fitted, and fits none."""
    module, seen = sys.modules[train.__module__], list[dict[str, Tensor]]()
    monkeypatch.setattr(
        module, "report_run", lambda session: seen.append(dict(session.teachers.of("queries").state_dict()))
    )
    first = run(tmp_path, shared_corpus, {"queries": {"fit": True}})
    monkeypatch.setattr(Queries, "fit_teacher", lambda *arguments: pytest.fail("fitted again"))
    again = run(tmp_path, shared_corpus, {"queries": {"fit": True}}, resume=True)
    assert again[0] == first[0]
    assert len(seen) == 2 and seen[0] and all(tensor.equal(seen[1][name]) for name, tensor in seen[0].items())
