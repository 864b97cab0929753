"""A finished run, opened again: the same numbers in another process, from its folder alone, or a clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from foveate.errors import DataError, PluginError, RunError, UserError
from foveate.loaded import LoadedRun, load_run
from foveate.objective import Moment
from foveate.run import Run
from foveate.training import train
from tests.corpus import write_corpus
from tests.objectives import plugins_with
from tests.showing import DRAWING, RATES, array, finished_run, plugins

ROOT = Path(__file__).parents[2]
CHECKED = """
import json, sys, torch
from foveate.loaded import load_run
from foveate.objective import Moment
from tests.showing import plugins
from tests.unit.test_loaded import losses
torch.set_num_threads(1)
run = load_run(sys.argv[1], device="cpu", plugins=plugins())
assert not run.learner.training
print(json.dumps(losses(run.learner, run.data, run.recipe.stages[-1])))
"""


def losses(learner: Any, data: Any, stage: Any) -> dict[str, str]:
    """The parts of the loss on a stage's first packed row, to the last bit."""
    batch = next(data.stage(stage).steps()).batches[0]
    with torch.no_grad():
        terms = learner(batch, Moment(3, "anything", 1)).terms
    return {name: float(term.total).hex() for name, term in terms.items()}


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Run:
    """`alone` is in the first stage only, `mask` and `beside` in the second, `sketch` in none."""
    objectives = {"alone": {"type": "drawn"}, "mask": {"type": "drawn_mask"}, "beside": {"type": "drawn"}, "sketch": {}}
    stages: list[dict[str, Any]] = [
        {"name": "first", "objectives": ["alone"], "train": {**RATES, "alone": 1e-2}},
        {"name": "second", "objectives": ["mask", "beside"], "train": {"llm": 1e-3, "mask": 1e-2, "beside": 1e-2}},
    ]
    return finished_run(tmp_path_factory.mktemp("two"), shared_corpus, objectives, stages)


@pytest.fixture(scope="module")
def opened(two_stages: Run) -> LoadedRun:
    return load_run(two_stages.folder, device="cpu", plugins=plugins())


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three pictures of noise, of several sizes."""
    rng, paths = np.random.default_rng(), []
    for name, size in (("wide.png", (20, 40)), ("tall.png", (50, 30)), ("square.png", (16, 16))):
        paths.append(tmp_path / name)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_another_process_gets_the_same_losses_bit_for_bit(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shift, edits, extra tokens, and a fitted teacher that has its own copy of an encoder that was trained."""
    sessions: list[Any] = []
    monkeypatch.setattr(sys.modules[train.__module__], "report_run", sessions.append)
    causal = {"wish": "causal"}  # another wish does not go together with a shift
    objectives = {"noisy": {"shift": 1}, "masked": causal, "queries": {"fit": True, "encoder": True}}
    run = finished_run(tmp_path, shared_corpus, objectives, [{"max_steps": 3}])
    expected = losses(sessions[0].learner.eval(), sessions[0].data, sessions[0].recipe.stages[-1])
    assert expected.keys() == {"text", "noisy", "masked", "queries"}
    command = [sys.executable, "-c", CHECKED, str(run.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == expected


def test_weights_of_a_float64_run_keep_every_bit(tmp_path: Path, shared_corpus: Path) -> None:
    stages = [{"max_steps": 1, "train": {**RATES, "drawn": 1e-2}}]
    run = finished_run(tmp_path, shared_corpus, {"drawn": {}}, stages, precision="fp64")
    again = load_run(run.folder, device="cpu", plugins=plugins())
    stored = {
        key: value for path in (run.folder / "model").glob("*.safetensors") for key, value in load_file(path).items()
    }
    own = again.lmm.state_dict()
    assert all(torch.equal(own[name], value) and value.dtype is torch.float64 for name, value in stored.items())
    head = load_file(run.folder / "model" / "objectives" / "drawn" / "weights.safetensors")
    assert torch.equal(again.learner.objectives["drawn"].head.weight, head["head.weight"])  # type: ignore[union-attr,arg-type]


def test_what_a_run_holds(two_stages: Run, opened: LoadedRun) -> None:
    assert opened.run.folder == two_stages.folder and opened.metrics() == two_stages.metrics()
    assert [stage.name for stage in opened.recipe.stages] == ["first", "second"]
    assert not any(module.training for module in opened.learner.modules())
    assert opened.data.tokenizer.get_vocab()["<image>"] >= 0
    opened.run.log({"stage": "first", "step": 99})
    assert opened.metrics() == two_stages.metrics(), "looking at a run does not write to it"


def test_every_objective_is_shown_whatever_stage_used_it(opened: LoadedRun, pictures: list[Path]) -> None:
    found = opened.show(pictures)
    assert list(found) == ["alone", "mask", "beside", "sketch"]
    assert {name: len(drawn) for name, drawn in found.items()} == dict.fromkeys(found, 3)
    assert [entry.title for entry in found["alone"]] == [f"error of {path.name}" for path in pictures]
    edited = [array(entry)[..., 2] / 255 for entry in found["beside"]]
    masks = [array(entry) / 255 for entry in found["mask"]]
    assert all(np.array_equal(blue, mask) for blue, mask in zip(edited, masks, strict=True)), "as they were trained"
    assert 0 < np.mean(masks) < 1
    assert not any(array(entry)[..., 2].any() for entry in found["alone"]), "its stage had no editor"


def test_a_target_objective_gets_the_picture_in_the_last_stages_geometry(
    opened: LoadedRun, pictures: list[Path]
) -> None:
    drawn = opened.show(pictures[2:], ["sketch"])["sketch"]
    with Image.open(pictures[2]) as original:  # as large as the encoder's square: nothing is resized
        assert np.abs(array(drawn[0]) - np.asarray(original).astype(int)).max() <= 1


def test_noise_depends_on_the_seed_and_the_picture_alone(opened: LoadedRun, pictures: list[Path]) -> None:
    def green(found: Any, at: int) -> np.ndarray:
        return array(found["alone"][at])[..., 1]

    first = opened.show(pictures, ["alone"])
    assert np.array_equal(green(first, 1), green(opened.show(pictures[1:], ["alone"]), 0))
    assert np.abs(array(first["alone"][1]) - array(opened.show(pictures[1:], ["alone"])["alone"][0])).max() <= 1
    for changed in (opened.show(pictures, ["alone"], seed=5), opened.show(pictures, ["alone"], step=1)):
        assert not np.array_equal(green(first, 1), green(changed, 1))


def test_pictures_may_be_of_pillow_and_many(opened: LoadedRun, pictures: list[Path]) -> None:
    hardware = opened.recipe.hardware.model_copy(update={"tokens_per_microbatch": 20})
    small = replace(opened, recipe=opened.recipe.model_copy(update={"hardware": hardware}))
    images = [Image.open(path) for path in pictures]
    whole, rows = opened.show(images, ["beside"])["beside"], small.show(images, ["beside"])["beside"]
    assert [entry.title for entry in rows] == ["error of image 1", "error of image 2", "error of image 3"]
    assert max(np.abs(array(a) - array(b)).max() for a, b in zip(whole, rows, strict=True)) <= 1


def test_data_of_the_run_are_the_best_there_are(tmp_path: Path, shared_corpus: Path) -> None:
    """Held-out data of the evaluation, else of the last stage, else what the objective was trained on."""
    rows = json.loads((shared_corpus / "data.json").read_text())
    (tmp_path / "held.json").write_text(json.dumps([{**row, "id": f"held-{row['id']}"} for row in rows]))
    held = {"path": str(tmp_path / "held.json"), "images": str(shared_corpus / "images")}
    evaluated = {"path": str(tmp_path / "asked.json"), "images": str(shared_corpus / "images")}
    (tmp_path / "asked.json").write_text(json.dumps([{**row, "id": f"asked-{row['id']}"} for row in rows]))
    evaluate = {"data": [evaluated], "metrics": ["answers"]}
    stages = [{"validate": {"data": [held]}, "max_steps": 1}]
    run = finished_run(tmp_path, shared_corpus, {"drawn": {}}, stages, evaluate=evaluate)
    loaded = load_run(run.folder, device="cpu", plugins=plugins())
    bare = loaded.recipe.model_copy(update={"evaluate": None})
    stage = bare.stages[0].model_copy(update={"validate_": None})
    recipes = {"asked-": loaded.recipe, "held-": bare, "": bare.model_copy(update={"stages": (stage,)})}
    for start, recipe in recipes.items():
        drawn = replace(loaded, recipe=recipe).show_data(5)["drawn"]
        names = [entry.title.removeprefix("error of ") for entry in drawn]
        assert len(names) == 5 and all(name.startswith(start) for name in names)
        assert all(name.removeprefix(start) in {row["id"] for row in rows} for name in names)


def test_an_objective_whose_pictures_are_not_in_the_data_draws_none(opened: LoadedRun) -> None:
    found = opened.show_data(3)
    assert {name: len(drawn) for name, drawn in found.items()} == {"alone": 3, "mask": 3, "beside": 3, "sketch": 0}


def test_a_run_that_moved_and_whose_data_are_gone(tmp_path: Path, pictures: list[Path]) -> None:
    corpus = write_corpus(tmp_path / "corpus", samples=12)
    run = finished_run(tmp_path / "there", corpus, {"drawn": {}}, [{"max_steps": 1}])
    before = load_run(run.folder, device="cpu", plugins=plugins()).show(pictures)["drawn"]
    here = tmp_path / "my runs" / "ünicode"
    shutil.copytree(run.folder, here)
    shutil.rmtree(tmp_path / "there")
    shutil.rmtree(corpus)
    moved = load_run(here, device="cpu", plugins=plugins())
    assert moved.recipe.output == here
    after = moved.show(pictures)["drawn"]
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(before, after, strict=True))
    with pytest.raises(DataError, match=r"these data are not here: .*data\.json"):
        moved.show_data()


def test_what_is_no_finished_run_is_told_with_what_to_do(two_stages: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such folder"):
        load_run(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"is not a run: it has no recipe\.yaml"):
        load_run(tmp_path)
    with pytest.raises(RunError, match=rf"is not a run.*Give {two_stages.folder}\."):
        load_run(two_stages.folder / "model")
    for name in ("recipe.yaml", "manifest.json", "metrics.jsonl"):
        shutil.copy(two_stages.folder / name, tmp_path)
    with pytest.raises(RunError, match=rf"has not finished.* foveate train .* --resume --set output={tmp_path}"):
        load_run(tmp_path)


def test_a_plugin_that_is_missing_broken_or_another_is_told(two_stages: Run, tmp_path: Path) -> None:
    without = {name: cls for name, cls in DRAWING.items() if name != "drawn"}
    with pytest.raises(RunError, match=r"unknown objective 'drawn'(.|\n)*trained with foveate .*lab"):
        load_run(two_stages.folder, plugins=plugins_with(without))
    broken: dict[str, Any] = {**DRAWING, "drawn": "no_such_module:Drawn"}
    with pytest.raises(RunError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        load_run(two_stages.folder, plugins=plugins_with(broken))

    class Other(DRAWING["drawn"]):  # type: ignore[misc,name-defined]
        def __init__(self, options: Any, context: Any):
            super().__init__(options, context)
            self.head = torch.nn.Linear(context.llm_width, 4)

    with pytest.raises(RunError, match=r"head\.bias of objective 'alone'.* has shape \(3,\)"):
        load_run(two_stages.folder, plugins=plugins_with({**DRAWING, "drawn": Other}))
    shutil.copytree(two_stages.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model" / "objectives" / "mask")
    with pytest.raises(RunError, match=r"objectives/mask/objective\.json cannot be read: No such file"):
        load_run(tmp_path / "run", plugins=plugins())


def test_a_fitted_teacher_that_is_missing_is_told(tmp_path: Path, shared_corpus: Path) -> None:
    run = finished_run(tmp_path, shared_corpus, {"queries": {"fit": True}}, [{"max_steps": 1}])
    shutil.rmtree(run.folder / "teachers")
    with pytest.raises(RunError, match="lacks the fitted teacher of objective 'queries'"):
        load_run(run.folder, plugins=plugins())


def test_what_cannot_be_shown_is_told(
    opened: LoadedRun, pictures: list[Path], tmp_path: Path, shared_corpus: Path
) -> None:
    with pytest.raises(UserError, match="the run has no objective 'msk'; did you mean 'mask'"):
        opened.show(pictures, ["msk"])
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        opened.show([tmp_path / "gone.png"])
    run = finished_run(tmp_path / "a", shared_corpus, {"failing": {}, "noisy": {}}, [{"max_steps": 1}])
    again = load_run(run.folder, device="cpu", plugins=plugins())
    assert again.show(pictures, ["noisy"]) == {"noisy": []}, "it draws nothing"
    with pytest.raises(PluginError, match=r"'failing' failed in .*Failing\.visualize: ValueError: no colours left"):
        again.show(pictures)
