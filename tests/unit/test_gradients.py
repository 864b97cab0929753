"""The gradient of each part of the loss: against passes of each part alone, and without a trace in the training."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from foveate.errors import RecipeError, TrainingError
from foveate.gradients import GradientProbe
from foveate.learner import Learner
from foveate.objective import LossTerm
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.session import Interrupted
from foveate.training import train
from tests.alone import logged, watched
from tests.corpus import recipe_dict, write_recipe
from tests.objectives import ALL, Noisy, plugins_with

TRAIN: dict[str, Any] = {"encoder": 1e-3, "projector": 1e-3, "llm": 1e-3}
LORA: dict[str, Any] = {"projector": 1e-3, "llm": {"lr": 1e-2, "lora": {"r": 2}}}
OBJECTIVES: dict[str, Any] = {
    "second": {"type": "noisy", "layers": [1], "start_step": 1, "end_step": 3},
    "masked": {"wish": "causal", "weight": {0: 2, 4: 0}},
    "queries": {"tokens": 2, "weight": 0.25},
}
EXACT: dict[str, Any] = {"precision": {"compute": "fp64", "teachers": "fp64"}}


class Dropping(Noisy):
    """Draws from torch's global generator."""

    def loss(self, outputs: Any, targets: Any, state: Any) -> LossTerm:
        rows = nn.functional.dropout(outputs.states(), 0.3)
        error = self.head(rows + torch.rand_like(rows)).square().sum(-1)
        return LossTerm(error.sum(), {"error": (error.sum(), len(error))})


TYPES = {**ALL, "dropping": Dropping}


def run(
    folder: Path, corpus: Path, objectives: dict[str, Any], *, train_: dict[str, Any] = TRAIN, budget: int = 16384,
    resume: bool = False, hardware: dict[str, Any] | None = None, top: dict[str, Any] | None = None, **changes: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:  # fmt: skip
    """Train one stage; its lines of metrics but for times, and all weights."""
    folder.mkdir(exist_ok=True)
    rates = {**train_, **dict.fromkeys(objectives, 1e-2)}
    stage = {**recipe_dict(corpus)["stages"][0], "train": rates, **changes}
    content = recipe_dict(corpus, output=str(folder / "run"), objectives=objectives, stages=[stage], **(top or {}))
    content["hardware"] = {"workers": 0, "tokens_per_microbatch": budget, **(hardware or {})}
    recipe = load_recipe(write_recipe(folder, content), plugins=plugins_with(TYPES))
    result = train(recipe, resume=resume, display=Display(quiet=True))
    times = ("step_seconds", "data_wait")
    lines = [{key: value for key, value in line.items() if key not in times} for line in result.metrics()]
    files = sorted((result.folder / "model").rglob("*.safetensors"))
    return lines, {f"{file.parent.name}:{name}": value for file in files for name, value in load_file(file).items()}


def weight_of(part: str, step: int) -> float:
    return {"masked": 2 - step / 2, "queries": 0.25}.get(part, 1.0)


@pytest.mark.parametrize("trained", [TRAIN, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("budget", [16384, 60])
def test_norms_and_cosines_are_those_of_each_part_alone(
    tmp_path: Path, shared_corpus: Path, budget: int, trained: dict[str, Any]
) -> None:
    """A part that sits steps out, one whose weight falls to 0, samples without a picture or without text."""
    top = {**EXACT, "gradients_every": 1}
    with watched(weight_of) as expected:
        lines, _ = run(
            tmp_path / "a", shared_corpus, OBJECTIVES, train_=trained, budget=budget, top=top, max_steps=5,
            batch_size=7, schedule="constant",
        )  # fmt: skip
    assert len(expected) == 5
    for line in lines:
        told, own = logged(line), expected["only", line["step"]]
        assert told.keys() == own.keys()
        assert told == pytest.approx(own, rel=1e-9, abs=1e-9)
    assert [("gradient/second/llm" in line, "cosine/second~masked/llm" in line) for line in lines] == [
        (step in (2, 3), step in (2, 3)) for step in range(1, 6)
    ]
    assert list(logged(lines[1]))[:4] == [f"gradient/{part}/projector" for part in ("text", *OBJECTIVES)]
    assert lines[4]["gradient/masked/llm"] == 0 and "cosine/text~masked/llm" not in lines[4]
    assert lines[0]["gradient/text/llm"] > 0 and abs(lines[0]["cosine/text~masked/llm"]) < 1


@pytest.mark.parametrize("objectives", [{"queries": {}, "masked": {}}, {}], ids=["objectives", "text"])
def test_they_add_up_to_the_gradient_of_the_step(
    tmp_path: Path, shared_corpus: Path, objectives: dict[str, Any]
) -> None:
    """With heads and encoder frozen, the square of its norm is the sum over all pairs, and over both places."""
    changes: dict[str, Any] = {"frozen": list(objectives), "train": {"projector": 1e-3, "llm": 1e-3}, "max_steps": 2}
    lines, _ = run(tmp_path / "a", shared_corpus, objectives, top={**EXACT, "gradients_every": 1}, **changes)
    parts = ["text", *objectives]
    for line in lines:
        square = 0.0
        for place in ("projector", "llm"):
            square += sum(line[f"gradient/{part}/{place}"] ** 2 for part in parts)
            for key, cosine in line.items():
                kind, _, rest = key.partition("/")
                if kind == "cosine" and rest.endswith(place):
                    first, second = rest.split("/")[0].split("~")
                    norms = line[f"gradient/{first}/{place}"] * line[f"gradient/{second}/{place}"]
                    square += 2 * cosine * norms
        assert line["grad_norm"] ** 2 == pytest.approx(square, rel=1e-9)


@pytest.mark.parametrize(
    ("trained", "places"),
    [({"llm": 1e-3}, {"llm"}), ({"encoder": 1e-3, "projector": 1e-3}, {"projector"})],
)
def test_what_is_frozen_has_no_gradient(
    tmp_path: Path, shared_corpus: Path, trained: dict[str, Any], places: set[str]
) -> None:
    lines, _ = run(
        tmp_path / "a", shared_corpus, {"noisy": {}}, train_=trained, top={"gradients_every": 2}, max_steps=3
    )
    assert [bool(logged(line)) for line in lines] == [False, True, False]
    assert logged(lines[1]).keys() == {
        f"{name}/{place}" for name in ("gradient/text", "gradient/noisy", "cosine/text~noisy") for place in places
    }


@pytest.mark.parametrize("saver", ["none", "gradient_checkpointing"])
def test_it_changes_nothing_bit_by_bit(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch, saver: str
) -> None:
    """Dropout in an objective and in adapters, several micro-batches; as many forward passes as without."""
    passes = [0]
    forward = Learner.forward

    def counted(self: Learner, *arguments: Any, **named: Any) -> Any:
        passes[0] += 1
        return forward(self, *arguments, **named)

    monkeypatch.setattr(Learner, "forward", counted)
    adapters = {"projector": 1e-3, "llm": {"lr": 1e-2, "lora": {"r": 2, "dropout": 0.5}}}
    results, numbers = [], []
    for name, every in (("without", None), ("with", 1)):
        passes[0] = 0
        results.append(
            run(
                tmp_path / name, shared_corpus, {"dropping": {}, "masked": {"weight": 0.5}}, train_=adapters, budget=60,
                hardware={saver: True} if saver != "none" else {}, top={"gradients_every": every}, max_steps=5,
                validate={"data": recipe_dict(shared_corpus)["stages"][0]["data"], "every": 2},
            )
        )  # fmt: skip
        numbers.append(passes[0])
    (plain, weights), (looked, again) = results
    assert numbers[0] == numbers[1] > 10
    assert all(logged(line) for line in looked)
    assert [{key: line[key] for key in line.keys() - logged(line).keys()} for line in looked] == plain
    assert weights.keys() == again.keys() and all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_a_resumed_run_measures_the_same(tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same steps, with the same weights; and a run may be resumed with another interval."""
    top = {"gradients_every": 2}
    whole, weights = run(tmp_path / "a", shared_corpus, OBJECTIVES, top=top, max_steps=6)
    loss = Noisy.loss

    def interrupting(self: Noisy, outputs: Any, *others: Any) -> LossTerm:
        if outputs._moment.step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(self, outputs, *others)

    monkeypatch.setattr(Noisy, "loss", interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", shared_corpus, OBJECTIVES, top=top, max_steps=6)
    monkeypatch.undo()
    resumed, again = run(tmp_path / "b", shared_corpus, OBJECTIVES, top=top, max_steps=6, resume=True)
    assert resumed == whole and [line["step"] for line in resumed if logged(line)] == [2, 4, 6]
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    with pytest.raises(Exception, match="cannot be resumed: the recipe"):
        changed = {**OBJECTIVES, "queries": {"tokens": 2, "weight": {0: 0.25}}}
        run(tmp_path / "b", shared_corpus, changed, top=top, max_steps=6, resume=True)


def test_trackers_are_told_names_that_all_of_them_take(tmp_path: Path, shared_corpus: Path) -> None:
    top = {"gradients_every": 1, "trackers": ["tensorboard"]}
    run(tmp_path / "a", shared_corpus, {"noisy": {}}, top=top, max_steps=1)
    files = [EventAccumulator(str(file)).Reload() for file in tmp_path.rglob("*tfevents*")]
    names = {name for file in files for name in file.Tags()["scalars"]}
    assert {"only/gradient/noisy/llm", "only/cosine/text.noisy/llm"} <= names


def test_its_memory_is_tried_before_the_first_step(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room for gradients")

    monkeypatch.setattr(GradientProbe, "add", full)
    with pytest.raises(
        TrainingError, match=r"out of memory in the largest micro-batch of stage only.*no room for grad"
    ):
        run(tmp_path / "a", shared_corpus, {"noisy": {}}, top={"gradients_every": 100})
    assert not (tmp_path / "a" / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("trained", "compiled", "said"),
    [
        ({"encoder": 1e-3}, False, "gradients_every: no stage trains projector or llm, whose gradients it measures"),
        ({"llm": 1e-3}, True, "gradients_every: compiled blocks allow one backward pass; leave it or hardware.compile"),
    ],
)
def test_what_cannot_be_measured(
    tmp_path: Path, shared_corpus: Path, trained: dict[str, Any], compiled: bool, said: str
) -> None:
    """Compiled code reuses what the first pass has read: a second one would be wrong, and silently so."""
    top = {"gradients_every": 1}
    with pytest.raises(RecipeError, match=said):
        run(
            tmp_path / "a",
            shared_corpus,
            {"x": {"type": "noisy"}},
            train_=trained,
            hardware={"compile": compiled},
            top=top,
        )
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize("every", [0, -1, 1.5, "often"])
def test_an_interval_is_a_number_of_steps(tmp_path: Path, shared_corpus: Path, every: Any) -> None:
    path = write_recipe(tmp_path, recipe_dict(shared_corpus, gradients_every=every))
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:1: gradients_every: must be "):
        load_recipe(path)
