"""Swapping the conditions: every loss by the formulas written down again, what is swapped with what, the command."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from foveate import Learner, LoadedRun, Moment, Sample, load_run
from foveate.data.llava import LlavaDataset
from foveate.data.packing import pack
from foveate.data.sample import build_sample, load_pixels
from foveate.errors import RunError, UserError
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from foveate_ross.conditions import Swapped, swapped_conditions
from tests.conftest import Command
from tests.corpus import recipe_dict, write_corpus, write_recipe
from tests.exports import MLP, encoder, llm, trained_run
from tests.plugins.ross import reference
from tests.plugins.ross.reference import TEACHERS, small, spread

FAMILY: dict[str, dict[str, Any]] = {
    "dit": {"teacher": TEACHERS["kl"], "denoiser": small("dit"), "draws": 1},
    "vit": {"teacher": TEACHERS["features"], "denoiser": small("vit"), "prediction": "v", "draws": 2},
    "pixels": {"teacher": TEACHERS["raw"], "variant": "regress_pixels"},
    "latents": {"teacher": TEACHERS["kl"], "variant": "regress_latents"},
    "through": {"teacher": TEACHERS["kl"], "variant": "regress_latents_to_pixels"},
}
OBJECTIVES: dict[str, Any] = {name: {"type": "ross", **options} for name, options in FAMILY.items()}
SEED = 3


FULL = {"compute": "fp64", "teachers": "fp64"}


def made_run(
    folder: Path, corpus: Path, objectives: dict[str, Any], steps: int, precision: Any = "fp32", **stage: Any
) -> Path:  # fmt: skip
    content = recipe_dict(
        corpus, output=str(folder / "run"), objectives=objectives, seed=SEED, precision=precision
    )  # fmt: skip
    rates = dict.fromkeys(("projector", "llm", *objectives), 1e-2)
    content["stages"][0] |= {"max_steps": steps, "train": rates, "geometry": "resize", **stage}
    folder.mkdir(parents=True, exist_ok=True)
    return train(load_recipe(write_recipe(folder, content)), display=Display(quiet=True)).folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples with twelve pictures: two samples have two, two have none."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of one step, in float64."""
    return made_run(tmp_path_factory.mktemp("made"), corpus, OBJECTIVES, 1, FULL)


@pytest.fixture(scope="module")
def run(path: Path) -> LoadedRun:
    """The run, its heads of everyday weights."""
    loaded = load_run(path, device="cpu")
    for number, name in enumerate(FAMILY):
        spread(loaded.learner.objectives[name], number)
    return loaded


class Image:
    """An image as its objective sees it: its sample packed alone."""

    def __init__(self, run: LoadedRun, name: str, sample: Any, number: int):
        rules = run.data.rules(run.recipe.stages[-1])
        seen = run.learner.look(pack([sample], rules.objectives), Moment(SEED, "only"), list(OBJECTIVES))[name]
        self.objective, self.number = run.learner.objectives[name], number
        self.outputs, self.targets = seen.outputs, seen.targets
        self.states = self.outputs.split(self.outputs.states())[number]

    def loss(self, states: Any) -> float:
        """Its mean over tokens, by the formulas, with some states in the place of its own."""
        outputs, parts = copy.copy(self.outputs), self.outputs.split(self.outputs.states())
        parts[self.number] = states
        outputs._states = lambda layer: torch.cat(parts)
        counts = [[number == self.number] * len(part) for number, part in enumerate(parts)]
        return reference.loss(self.objective, outputs, self.targets, counts) / len(states)


def images_of(run: LoadedRun, corpus: Path, name: str) -> dict[tuple[str, int], Image]:
    samples = samples_of(run, corpus)
    return {
        (sample.id, record.index): Image(run, name, sample, record.index)
        for sample in samples for record in sample.images
    }  # fmt: skip


def samples_of(run: LoadedRun, corpus: Path) -> list[Sample]:
    rules = run.data.rules(run.recipe.stages[-1])
    rows = LlavaDataset(LlavaDataset.Options(path=corpus / "data.json", images=corpus / "images"))
    return [load_pixels(build_sample(rows[index], rules), rules) for index in range(len(rows))]


@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_losses_are_those_of_the_formulas(name: str, run: LoadedRun, corpus: Path) -> None:
    """In float64: the image's own states, and those of the image before it among the first, or second, of samples."""
    found = swapped_conditions(run, name)
    images = images_of(run, corpus, name)
    assert set(found.images) == set(images) and len(images) == 12 and found.origin == "train"
    chains = [[key for key in found.images if key[1] == index] for index in (0, 1)]
    assert [len(chain) for chain in chains] == [10, 2]
    donors = {key: chain[at - 1] for chain in chains for at, key in enumerate(chain)}
    assert all(donor[0] != key[0] for key, donor in donors.items())
    for at, key in enumerate(found.images):
        assert found.own[at] == pytest.approx(images[key].loss(images[key].states), rel=1e-9), key
        assert found.swapped[at] == pytest.approx(images[key].loss(images[donors[key]].states), rel=1e-9), key
    told = found.summary()
    assert told["images"] == 12 and told["gap"] == pytest.approx(np.mean(found.swapped) - np.mean(found.own), rel=1e-9)
    if name == "dit":  # a draw of an image: its loss is that of one timestep
        times = [time_of(images[key]) * 4 // 1000 for key in found.images]
        assert set(times) == {quarter for quarter in range(4) if told["by_time"][quarter]["own"] is not None}
        for quarter in set(times):
            mine = np.array(times) == quarter
            expected = {"own": found.own[mine].mean(), "swapped": found.swapped[mine].mean()}
            assert told["by_time"][quarter] == pytest.approx(expected, rel=1e-9)
    assert len(told["by_time"]) == (4 if name in ("dit", "vit") else 0)
    other = swapped_conditions(run, name, seed=SEED + 1)
    assert np.array_equal(other.own, found.own) == (name in ("pixels", "through")), "neither draws"


def time_of(image: Image) -> int:
    generator = image.outputs.generator(image.number, "draw 0")
    return int(torch.randint(1000, (), generator=generator))


def test_an_untouched_denoiser_does_not_listen(path: Path) -> None:
    """After one step its exit is no longer zero, but its modulations are: no state can matter yet, and none does."""
    found = swapped_conditions(load_run(path, device="cpu"), "dit", 5)
    assert len(found.own) == 5 and np.array_equal(found.own, found.swapped) and not np.allclose(found.own, 1, atol=1e-6)
    told = found.summary()
    assert (told["gap"], told["interval"], told["hurt"]) == (0.0, [0.0, 0.0], 0.0)


def test_the_interval_is_students(path: Path) -> None:
    """The 97.5 % quantile of Student's t with five degrees of freedom is 2.570582."""
    own, swapped = np.random.default_rng().normal(size=(2, 6))
    told = Swapped("ross", "train", (("a", 0),) * 6, own, swapped, ()).summary()
    gaps = [b - a for a, b in zip(own, swapped, strict=True)]
    mean = sum(gaps) / 6
    error = (sum((gap - mean) ** 2 for gap in gaps) / 5 / 6) ** 0.5
    assert told["standard_error"] == pytest.approx(error)
    assert told["interval"] == pytest.approx([mean - 2.570582 * error, mean + 2.570582 * error], rel=1e-5)
    assert told["hurt"] == sum(gap > 0 for gap in gaps) / 6


def test_a_head_that_has_learned_from_the_states_is_hurt(tmp_path: Path, shared_corpus: Path) -> None:
    """Scans of digits, regressed from the LLM's states: those of another are worse, on pictures never trained on."""
    held_out = tmp_path / "held-out"
    rows = json.loads((write_corpus(held_out, 84) / "data.json").read_text())[48:]
    (held_out / "data.json").write_text(json.dumps(rows))
    objectives = {"ross": {"teacher": TEACHERS["raw"], "variant": "regress_pixels"}}
    made = made_run(tmp_path, shared_corpus, objectives, 25)
    changed(made, data=held_out, validate=True)
    told = swapped_conditions(load_run(made, device="cpu")).summary()
    assert told["data"] == "validate" and told["images"] == 36
    assert told["interval"][0] > 0.1 * told["own"] and told["hurt"] > 0.8


def changed(run: Path, data: Path, validate: bool = False) -> None:
    """Lets a run's recipe name other data."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    sources = [{"path": str(data / "data.json"), "images": str(data / "images")}]
    recipe["stages"][0] |= {"validate": {"data": sources}} if validate else {"data": sources}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_images_that_look_the_same_count_once(path: Path, corpus: Path, tmp_path: Path) -> None:
    """Many questions about one picture would swap its states with its own; one picture alone cannot be swapped."""
    rows = json.loads((corpus / "data.json").read_text())
    singles = [row for row in rows if isinstance(row.get("image"), str)]

    def asked(chosen: list[dict[str, Any]]) -> LoadedRun:
        folder = tmp_path / f"{len(chosen)}"
        shutil.copytree(corpus, folder / "corpus")
        again = [{**row, "id": f"{row['id']} {number}"} for number in range(3) for row in chosen]
        (folder / "corpus" / "data.json").write_text(json.dumps(again))
        shutil.copytree(path, folder / "run")
        changed(folder / "run", folder / "corpus")
        return load_run(folder / "run", device="cpu")

    found = swapped_conditions(asked(singles[:3]), "pixels")
    assert sorted(name.split()[0] for name, _ in found.images) == sorted(row["id"] for row in singles[:3])
    for chosen, count in ((singles[:1], 1), ([row for row in rows if "image" not in row], 0)):
        with pytest.raises(RunError, match=f"have {count} images for objective 'pixels' that differ"):
            swapped_conditions(asked(chosen), "pixels")


def test_which_objective_is_meant(run: LoadedRun) -> None:
    for name, problem in ((None, "must be named"), ("rosso", "is not one of them: rosso")):
        with pytest.raises(UserError, match=f"of ROSS: {', '.join(FAMILY)}. The one to test {problem}"):
            swapped_conditions(run, name)
    with pytest.raises(UserError, match="no objective of ROSS"):
        swapped_conditions(replace(run, learner=Learner(run.lmm)))


def test_the_command(path: Path, foveate_command: Command) -> None:
    words = ("analyze", "conditions", path, "--objective", "vit", "--count", 5)
    status, text, errors = foveate_command(*words, "--json")
    assert status == 0, errors
    found = swapped_conditions(load_run(path, device="cpu"), "vit", 5)
    told = json.loads(text)
    assert told["images"] == 5 and told["own"] == pytest.approx(found.own.mean(), rel=1e-9)
    assert told["hurt"] == float((found.swapped > found.own).mean())
    status, table, errors = foveate_command(*words)
    assert status == 0 and f"{told['own']:.3f}" in table and "t 750…999" in table and "on training data" in table
    assert f"gap {told['gap']:.4g}" in table
    assert foveate_command(*words, "--seed", 9, "--json")[1] != text


def test_what_the_command_refuses(
    path: Path, tmp_path: Path, shared_corpus: Path, foveate_command: Command
) -> None:
    model = {"encoder": encoder("siglip"), "projector": MLP, "llm": llm("qwen2")}
    plain = trained_run(tmp_path, shared_corpus, model)
    for words, problem in (
        ((shared_corpus,), "is not a run"),
        ((plain,), "its recipe has no objectives"),
        ((path,), "The one to test must be named"),
        ((path, "--objective", "dit", "--count", 1), "count"),
        ((path, "--objective", "dit", "--device", "abacus"), "device abacus"),
    ):
        status, _, errors = foveate_command("analyze", "conditions", *words)
        assert status == 2 and problem in " ".join(errors.split()), (words, errors)


def test_targets_that_the_model_does_not_see(tmp_path: Path, corpus: Path) -> None:
    """The generative counterpart: states of another prompt's queries; the loss is the step's own."""
    rows = [row for row in json.loads((corpus / "data.json").read_text()) if "conversations" in row]
    names = sorted(path.name for path in (corpus / "images").iterdir())
    turned = [
        {"id": row["id"], "target_images": [name], "roles": None,
         "conversations": [{"from": "human", "value": f"Draw {name}."}, {"from": "gpt", "value": "Here."}]}
        for row, name in zip(rows, names, strict=False)
    ]  # fmt: skip
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    (folder / "data.json").write_text(json.dumps(turned))
    options = {"type": "ross_generative", "teacher": TEACHERS["kl"], "denoiser": small("dit"), "query_grid": [2, 2]}
    made = made_run(tmp_path, folder, {"draw": options}, 1, FULL, train={"llm": 1e-2, "draw": 1e-2})
    loaded = load_run(made, device="cpu")
    spread(loaded.learner.objectives["draw"], 1)
    found = swapped_conditions(loaded)
    batch = pack(samples_of(loaded, folder), loaded.data.rules(loaded.recipe.stages[-1]).objectives)
    with torch.no_grad():
        total = loaded.learner(batch, Moment(SEED, "only")).terms["draw"].total
    assert found.own.mean() == pytest.approx(float(total) / 16 / len(rows), rel=1e-9)
    assert len(found.own) == len(rows) and (found.own != found.swapped).all()
