"""Weights of the parts of the loss: by schedule, by stage, in what is logged and shown, and in the gradients."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from foveate.errors import RecipeError, TrainingError
from foveate.objective import LossTerm, ObjectiveOptions, weight_at
from foveate.progress import Display, describe
from foveate.recipe_file import load_recipe
from foveate.run import Run
from foveate.training import train
from foveate_lab.report import sections
from tests.corpus import recipe_dict, write_recipe
from tests.objectives import ALL, Noisy, plugins_with

RAMP = {1: 0.0, 3: 1.0, 4: 0.25}


class Scaled(Noisy):
    """Its loss has its weight inside: 0, 0, 0.5, 1, 0.25, 0.25, … over the steps."""

    def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
        term = super().loss(outputs, targets, state)
        return LossTerm(term.total * (0.0, 0.0, 0.5, 1.0, 0.25)[min(outputs._moment.step, 4)], term.metrics)


def recipe(folder: Path, corpus: Path, objectives: dict[str, Any], *stages: dict[str, Any], **top: Any) -> Path:
    """A recipe whose stages, `s0`, `s1`, …, train everything in float64; one stage where none is given."""
    folder.mkdir(exist_ok=True)
    base = recipe_dict(corpus)["stages"][0]
    base |= {"max_steps": 6, "train": {**base["train"], **dict.fromkeys(objectives, 1e-2)}}
    made = [{**base, "name": f"s{number}", **stage} for number, stage in enumerate(stages or ({},))]
    top = {"precision": {"compute": "fp64", "teachers": "fp64"}, **top}
    content = recipe_dict(corpus, output=str(folder / "run"), objectives=objectives, stages=made, **top)
    return write_recipe(folder, content)


def trained(path: Path, resume: bool = False) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Its lines of metrics but for times, and all weights."""
    loaded = load_recipe(path, plugins=plugins_with({**ALL, "scaled": Scaled}))
    run = train(loaded, resume=resume, display=Display(quiet=True))
    files = sorted((run.folder / "model").rglob("*.safetensors"))
    weights = {f"{file.parent.name}:{name}": value for file in files for name, value in load_file(file).items()}
    times = ("step_seconds", "data_wait")
    return [{key: value for key, value in line.items() if key not in times} for line in run.metrics()], weights


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        (0.5, {0: 0.5, 7: 0.5}),
        ({10: 2.0}, {0: 2.0, 10: 2.0, 11: 2.0}),
        ({0: 0.0, 200: 1.0}, {0: 0.0, 1: 0.005, 50: 0.25, 200: 1.0, 10**9: 1.0}),
        ({30: 0.0, 10: 1.0, 20: 3.0}, {9: 1.0, 10: 1.0, 15: 2.0, 20: 3.0, 29: 0.3, 30: 0.0, 31: 0.0}),
    ],
)
def test_a_schedule_is_linear_between_its_steps_and_constant_outside(weight: Any, values: dict[int, float]) -> None:
    given = ObjectiveOptions(weight=weight).weight
    assert {step: weight_at(given, step) for step in values} == pytest.approx(values, abs=1e-15)


def test_a_number_stays_a_number() -> None:
    assert ObjectiveOptions().weight == 1.0
    assert ObjectiveOptions.model_validate({"weight": 2}).weight * 0.5 == 1.0  # type: ignore[operator]


TEXT = """\
model: {{encoder: {encoder}, projector: mlp, llm: {llm}}}
objectives:
  near: {{type: noisy, weight: {weight}}}
  far: {{type: noisy}}
stages:
  - name: one
    data: [{{path: {corpus}/data.json, images: {corpus}/images}}]
    objectives: [near]
    train: {{llm: 1e-3, near: 1e-3}}
    batch_size: 2
    max_steps: 2
    weights: {weights}
"""


def complaints(folder: Path, corpus: Path, weight: str = "1", weights: str = "null") -> list[str]:
    values = recipe_dict(corpus)["model"]
    path = folder / "recipe.yaml"
    parts = {key: json.dumps(values[key]) for key in ("encoder", "llm")}
    path.write_text(TEXT.format(corpus=corpus, weight=weight, weights=weights, **parts))
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, plugins=plugins_with(ALL))
    return [line.partition("recipe.yaml:")[2] for line in str(raised.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("-1", "must be greater than or equal to 0, not -1, or must be a mapping, not -1"),
        (".inf", "must be a number, not '.inf', or must be a mapping, not '.inf'"),
        ("[1]", "must be a number, not [1], or must be a mapping, not [1]"),
        ("null", "must be a number, not empty, or must be a mapping, not empty"),
        ("{}", "must be a number, not {}, or must have at least one step, as `step: weight`"),
        ("{0: -0.5}", "must be greater than or equal to 0, not -0.5"),
        ("{0: 1e999}", "must be a finite number, not inf"),
        ("{0: full}", "must be a number, not 'full'"),
        ("{-1: 1}", "must be greater than or equal to 0, not '-1'"),
        ("{1.5: 1}", "must be a whole number, not '1.5'"),
        ("{start: 1}", "must be a whole number, not 'start'"),
        ("{9999999999999: 1}", "must be less than or equal to 1000000000000, not '9999999999999'"),
    ],
)
def test_what_is_no_weight(tmp_path: Path, shared_corpus: Path, weight: str, said: str) -> None:
    """Of an objective, and in a stage, each in its line."""
    for found in (
        complaints(tmp_path, shared_corpus, weight=weight),
        complaints(tmp_path, shared_corpus, weights=f"{{near: {weight}}}"),
    ):
        [line] = found
        assert re.fullmatch(r"(3|12):\d+: (objectives\.|stages\.0\.).*", line) and line.endswith(f": {said}"), line


def test_every_wrong_name_is_told_with_its_line(tmp_path: Path, shared_corpus: Path) -> None:
    found = complaints(tmp_path, shared_corpus, weights="{nea: 1, far: 2, texts: {0: 1}, text: x, llm: 1}")
    assert [re.sub(r"^12:\d+: stages.0.weights.", "", line) for line in found] == [
        "nea: unknown part of the loss 'nea'; did you mean 'near'?",
        "far: 'far' is not active in this stage; name it in `objectives`, or not here",
        "texts: unknown part of the loss 'texts'; did you mean 'text'?",
        "text: must be a number, not 'x', or must be a mapping, not 'x'",
        "llm: unknown part of the loss 'llm'; known: far, near, text",
    ]
    assert complaints(tmp_path, shared_corpus, weights="[near]")[0].endswith("must be a mapping, not ['near']")


def test_the_loss_is_the_weighted_sum_of_what_is_logged(tmp_path: Path, shared_corpus: Path) -> None:
    """A schedule, another stage's number, the text's; steps count from 0 in each stage; weight 0 is no absence."""
    objectives = {"ramp": {"type": "noisy", "weight": RAMP}, "masked": {"weight": 0.5}, "off": {"type": "noisy"}}
    second = {"weights": {"text": {0: 3, 2: 1}, "masked": 2, "off": {2: 0, 3: 1}}, "max_steps": 4}
    lines, _ = trained(recipe(tmp_path / "a", shared_corpus, objectives, {}, second))
    ramp = [0.0, 0.0, 0.5, 1.0, 0.25, 0.25]
    expected = [{"text": 1.0, "ramp": ramp[step], "masked": 0.5, "off": 1.0} for step in range(6)]
    expected += [
        {"text": text, "ramp": ramp[step], "masked": 2.0, "off": float(step == 3)}
        for step, text in enumerate((3, 2, 1, 1))
    ]
    assert len(lines) == len(expected)
    for line, weights in zip(lines, expected, strict=True):
        for name, weight in weights.items():
            assert line[f"loss/{name}"] > 0
            assert line[f"weighted/{name}"] == pytest.approx(weight * line[f"loss/{name}"], rel=1e-12)
        assert line["loss"] == pytest.approx(sum(line[f"weighted/{name}"] for name in weights), rel=1e-12)


def test_gradients_follow(tmp_path: Path, shared_corpus: Path) -> None:
    """The same training as with an objective that multiplies its loss itself; by the recipe and by a stage."""
    by_itself, expected = trained(recipe(tmp_path / "a", shared_corpus, {"noisy": {"type": "scaled"}}))
    for name, options, stage in (
        ("recipe", {"weight": RAMP}, {}),
        ("stage", {"weight": 7}, {"weights": {"noisy": RAMP, "text": 1}}),
    ):
        lines, weights = trained(recipe(tmp_path / name, shared_corpus, {"noisy": options}, stage))
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in by_itself], rel=1e-9)
        assert weights.keys() == expected.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-9, rtol=1e-9)
    constant = trained(recipe(tmp_path / "constant", shared_corpus, {"noisy": {}}))[1]
    assert not torch.allclose(constant["noisy:head.weight"], expected["noisy:head.weight"])


def test_what_waits_for_its_weight_need_not_move(tmp_path: Path, shared_corpus: Path) -> None:
    """The check after three steps; of a weight that is 0 for good, it still tells."""
    late = {2: 0.0, 3: 1.0}
    lines, _ = trained(recipe(tmp_path / "a", shared_corpus, {}, {"weights": {"text": late}}))
    assert [line["grad_norm"] > 0 for line in lines] == [False] * 3 + [True] * 3
    trained(recipe(tmp_path / "b", shared_corpus, {"noisy": {"weight": late}}))
    with pytest.raises(TrainingError, match="'noisy' is to be trained"):
        trained(recipe(tmp_path / "c", shared_corpus, {"noisy": {"weight": 0}}))


def test_a_resumed_run_goes_on_with_its_schedule(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives, stage = {"noisy": {"weight": RAMP}}, {"weights": {"text": {0: 1, 5: 0}}}
    whole, weights = trained(recipe(tmp_path / "a", shared_corpus, objectives, stage, checkpoint_every=3))
    path = recipe(tmp_path / "b", shared_corpus, objectives, stage, checkpoint_every=3)
    loss = Noisy.loss

    def dying(self: Noisy, outputs: Any, *others: Any) -> LossTerm:
        if outputs._moment.step == 4:
            raise KeyboardInterrupt
        return loss(self, outputs, *others)

    monkeypatch.setattr(Noisy, "loss", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(path)
    monkeypatch.undo()
    assert [line["step"] for line in Run(tmp_path / "b" / "run").metrics()] == [1, 2, 3, 4]
    again, others = trained(path, resume=True)
    assert again == whole and all(torch.equal(others[name], tensor) for name, tensor in weights.items())


def test_a_recipe_of_text_alone_logs_what_it_did_unless_its_weight_is_not_1(
    tmp_path: Path, shared_corpus: Path
) -> None:
    def weighted(name: str, stage: dict[str, Any], **top: Any) -> list[float | None]:
        path = recipe(tmp_path / name, shared_corpus, {}, {"max_steps": 2, **stage}, **top)
        return [line.get("weighted/text", 0) / line["loss/text"] for line in trained(path)[0]]

    assert weighted("one", {}) == [0, 0]
    assert weighted("half", {}, text={"weight": 0.5}) == pytest.approx([0.5, 0.5])
    assert weighted("stage", {"weights": {"text": {0: 1, 1: 2}}}) == pytest.approx([1, 2])


def test_what_a_run_keeps_of_its_recipe_is_read_again(tmp_path: Path, shared_corpus: Path) -> None:
    plugins = plugins_with(ALL)
    path = recipe(tmp_path, shared_corpus, {"noisy": {"weight": RAMP}}, {"weights": {"text": {0: 1, 5: 0}}})
    loaded = load_recipe(path, ["stages.s0.weights.noisy=2", "objectives.noisy.weight.9=4"], plugins=plugins)
    assert loaded.stages[0].weights == {"text": {0: 1.0, 5: 0.0}, "noisy": 2.0}
    assert loaded.objectives["noisy"].options.weight == {**RAMP, 9: 4.0}  # type: ignore[attr-defined]
    kept = tmp_path / "kept.yaml"
    kept.write_text(yaml.safe_dump(loaded.resolved()))
    assert load_recipe(kept, plugins=plugins).resolved() == loaded.resolved()


def test_a_twin_without_the_objective_has_no_weight_of_it(tmp_path: Path, shared_corpus: Path) -> None:
    recipe(tmp_path, shared_corpus, {"noisy": {}, "masked": {}}, {"weights": {"noisy": 2, "masked": 3}})
    twin = tmp_path / "twin.yaml"
    twin.write_text("extends: recipe.yaml\nobjectives: {noisy: false}\n")
    assert load_recipe(twin, plugins=plugins_with(ALL)).stages[0].weights == {"masked": 3.0}


def line_of(**values: float) -> dict[str, float]:
    return {"step_seconds": 1.0, "data_wait": 0.0, "images": 8, "tokens": 80, "lr/llm": 1e-3, **values}


def test_progress_shows_raw_losses_and_weights_that_are_not_1() -> None:
    raw = {"loss": 1.5, "loss/text": 1.0, "loss/ross": 0.412, "loss/off": 2.0}
    words = describe([line_of(**raw, **{"weighted/text": 1.0, "weighted/ross": 0.206, "weighted/off": 0.0})], None)
    assert words.startswith("loss 1.5000  text 1.0000  ross 0.4120 (×0.5)  off 2.0000 (×0)  8.00 images/s")
    assert "×" not in describe([line_of(**raw)], None)
    text = {"loss": 0.3, "loss/text": 0.9, "weighted/text": 0.3}
    assert describe([line_of(**text)], None).startswith("loss 0.3000  text 0.9000 (×0.333)  8.00")
    nothing = {"loss": 0.0, "loss/text": 0.0, "weighted/text": 0.0}
    assert describe([line_of(**nothing)], None).startswith("loss 0.0000  8.00")


@pytest.fixture
def page(tmp_path: Path) -> dict[str, str]:
    """The sections of a run whose `b` had a weight of 1 at first, with gradients in every second step."""
    lines = []
    for step in range(1, 9):
        raw = {"loss/text": 1.0 + step, "loss/a": 2.0, "loss/b": 3.0}
        weights = {"text": 1.0, "a": 1.0, "b": 1.0 if step < 5 else 0.5}
        line = line_of(loss=4.0, grad_norm=1.0, **raw)
        line |= {f"weighted/{name}": weight * raw[f"loss/{name}"] for name, weight in weights.items()}
        line |= {"a/error": 0.5, "cosine/error": 0.1, "weighted/error": 0.2, "gradient/error": 0.3}
        if step % 2 == 0:
            for place in ("projector", "llm"):
                line |= {f"gradient/{part}/{place}": 0.1 * step for part in ("text", "a", "b")}
                line |= {f"cosine/text~a/{place}": 0.5, f"cosine/text~b/{place}": -0.25, f"cosine/a~b/{place}": 0.1}
        lines.append(json.dumps({"stage": "only", "step": step, **line}))
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    return dict(sections(Run(tmp_path)))


def figures(html: str) -> dict[str, str]:
    found = re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", html, re.S)
    return {re.sub(r"<.*?>", "", title): body for title, body in found}


def test_the_report_draws_a_weighted_loss_where_its_weight_is_not_1(page: dict[str, str]) -> None:
    drawn = figures(page["Losses"])
    assert list(drawn) == ["loss", "loss/text", "loss/a", "loss/b — weighted"]
    assert [body.count("<path") for body in drawn.values()] == [1, 1, 1, 2]
    assert list(figures(page["Metrics of the objectives"])) == [
        "a/error", "cosine/error", "weighted/error", "gradient/error",
    ]  # fmt: skip


def test_the_report_draws_gradients_in_a_section_of_their_own(page: dict[str, str]) -> None:
    drawn = figures(page["Gradients of the parts of the loss"])
    assert list(drawn) == [
        "norm in projector — text — a — b", "norm in llm — text — a — b", "cosine of text ~ a — projector — llm",
        "cosine of text ~ b — projector — llm", "cosine of a ~ b — projector — llm",
    ]  # fmt: skip
    assert [body.count("<path") for body in drawn.values()] == [3, 3, 2, 2, 2]
    ticks = {
        label: float(y)
        for y, label in re.findall(
            r'y="([\d.]+)" text-anchor="end"[^>]*>(.*?)<', drawn["cosine of text ~ b — projector — llm"]
        )
    }
    assert {"-1", "0", "1"} <= ticks.keys()
    [height] = {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn["cosine of text ~ b — projector — llm"])}
    assert height == pytest.approx(ticks["0"] - 3.5 + (ticks["-1"] - ticks["0"]) / 4, abs=0.2)


def test_a_run_without_them_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"stage": "s", "step": 1, **line_of(loss=1.0, grad_norm=1.0)}) + "\n"
    )
    assert [title for title, _ in sections(Run(tmp_path))] == ["Losses", "Learning rates and gradient", "Speed"]
