"""The generative counterpart: learned queries condition the denoiser, and nobody but the teacher sees the target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import Learner, Moment, Outputs, assemble, resize_rows
from foveate.errors import TrainingError
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.testing.models import Bench, build_objective, pack_with_stand_ins, tiny_lmm
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.plugins.ross import reference
from tests.plugins.ross.reference import TEACHERS, chosen, small

OPTIONS = {"teacher": TEACHERS["kl"], "denoiser": small("dit"), "draws": 2}
MOMENT = Moment(5, "align", 1)


def bench_of(**options: Any) -> Bench:
    bench = Bench(chosen({**OPTIONS, **options}, "ross_generative"), tiny_lmm())
    reference.spread(bench.objective, 3)
    return bench


@pytest.mark.parametrize("grid", [None, [2, 2], [1, 3]])
def test_the_loss_is_that_of_ross_on_the_states_of_the_queries(grid: list[int] | None) -> None:
    """`Ross` with the same weights, shown the queries' states (interpolated, by the contract's own function)."""
    bench = bench_of(query_grid=grid)
    rows, columns = grid or (4, 4)
    batch = bench.pack([bench.samples[kind] for kind in ("two images", "wide picture", "text only")])
    assert all(record.extra["ross_generative"][1] == rows * columns for record in batch.images if record.extra)
    with torch.no_grad():
        seen = bench.learner.look(batch, MOMENT)["ross_generative"]
        found = bench.objective.loss(seen.outputs, seen.targets, None)
        queries = seen.outputs.extra_states().split(rows * columns)
        states = torch.cat([resize_rows(part, (rows, columns), (4, 4)) for part in queries])
        twin: Any = build_objective(chosen(OPTIONS), bench.lmm, "ross").double()
        head = {name: value for name, value in bench.objective.state_dict().items() if name != "queries"}
        twin.load_state_dict(head)
        records = [image.record for image in seen.outputs.images]
        shown = [type(record)(record.sample_id, record.index, "input", (4, 4), 0) for record in records]
        outputs = Outputs.of(shown, {-1: states}, moment=MOMENT, objective="ross_generative")
        expected = reference.loss(twin, outputs, seen.targets)
    assert len(records) == 3 and {record.role for record in records} == {"target"}
    assert float(found.total) == pytest.approx(expected, rel=1e-9)
    units = sum(bench.objective.count(bench.objective.options, record) for record in records)
    assert units == 48 and sum(count for _, count in found.metrics.values()) == 2 * 48


def test_the_model_does_not_see_the_target_but_its_prompt() -> None:
    """Another target changes the loss and no state; another prompt's states change; gradients reach the queries."""
    bench = bench_of()
    sample, other = bench.samples["one image"], bench.samples["another image"]
    target = [number for number, record in enumerate(sample.images) if record.role == "target"]
    swapped = [other.views[number] if number in target else view for number, view in enumerate(sample.views)]
    pixels = [other.pixels[number] if number in target else one for number, one in enumerate(sample.pixels)]
    changed = type(sample)(**{**vars(sample), "views": swapped, "pixels": pixels})

    def run(one: Any) -> tuple[torch.Tensor, float, float]:
        batch = pack_with_stand_ins([one], bench.rules)
        states = bench.learner.look(batch, MOMENT)["ross_generative"].outputs.extra_states()
        output = bench.learner(batch, MOMENT)
        return states, float(output.terms["ross_generative"].total.detach()), float(output.text_by_sample.sum())

    (states, loss, text), (same, moved, still) = run(sample), run(changed)
    assert torch.equal(states, same) and text == still and abs(loss - moved) > 1e-6
    assert not torch.allclose(states, run(other)[0])
    bench.learner(bench.pack([sample]), MOMENT).terms["ross_generative"].total.backward()
    queries: Any = bench.objective.queries
    assert (queries.grad.abs().sum(-1) > 0).all()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in bench.lmm.llm.parameters())


def test_it_shares_the_teacher_of_ross() -> None:
    lmm = tiny_lmm()
    both = {name: build_objective(chosen(OPTIONS, name), lmm, name).double() for name in ("ross", "ross_generative")}
    learner = Learner(lmm, both)
    assert learner.teachers.keys["ross"] == learner.teachers.keys["ross_generative"]
    assert learner.teachers.of("ross") is learner.teachers.of("ross_generative")
    pixels = {**OPTIONS, "variant": "regress_latents_to_pixels", "denoiser": None, "draws": None}
    decoding = build_objective(chosen(pixels), lmm, "ross")
    assert decoding.teacher_fingerprint() != learner.teachers.keys["ross"], "its records hold pixels too"


def corpus(folder: Path) -> tuple[Path, Path]:
    """Pictures that the model sees and describes; prompts for pictures that it does not see."""
    (folder / "images").mkdir(parents=True)
    seen, asked = [], []
    for number, colour in enumerate(("red", "green", "blue", "gold")):
        Image.new("RGB", (24, 24), colour).save(folder / "images" / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        seen.append({"id": f"seen{number}", "image": f"{colour}.png", "conversations": turns})
        turns = [{"from": "human", "value": f"Draw {colour}."}, {"from": "gpt", "value": "Here it is."}]
        asked.append({"id": f"asked{number}", "target_images": [f"{colour}.png"], "conversations": turns})
    for name, rows in (("seen", seen), ("asked", asked)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder / "seen.json", folder / "asked.json"


@pytest.mark.parametrize(
    ("first", "second", "units"),
    [
        (None, None, {"ross": 64, "ross_generative": 64}),
        (["ross_generative"], None, {"ross": 0, "ross_generative": 64}),
        (None, ["ross"], {"ross": 64, "ross_generative": 0}),
    ],
)
def test_a_source_says_which_objectives_apply(
    tmp_path: Path, first: list[str] | None, second: list[str] | None, units: dict[str, int]
) -> None:
    """The rows of the paper's table 2 differ by that. Four pictures are seen, four asked for, of 16 tokens each."""
    seen, asked = corpus(tmp_path / "corpus")
    sources = zip((seen, asked), (first, second), strict=True)
    images = str(tmp_path / "corpus" / "images")
    data = [{"path": str(path), "images": images, "objectives": names} for path, names in sources]
    heads = {"ross": OPTIONS, "ross_generative": {**OPTIONS, "query_grid": [2, 2]}}
    recipe = recipe_dict(tmp_path, output=str(tmp_path / "run"), objectives=heads)
    recipe["stages"][0] |= {"data": data, "max_steps": 1, "batch_size": 8}
    recipe["stages"][0]["train"] |= dict.fromkeys(heads, 1e-3)
    made = assemble(load_recipe(write_recipe(tmp_path, recipe)))
    [step] = made.data.stage(made.recipe.stages[0]).steps()
    assert {name: step.counts[name] for name in heads} == units
    totals = dict.fromkeys(heads, 0.0)
    with torch.no_grad():
        for batch in step.batches:
            for name, term in made.learner(batch, MOMENT).terms.items():
                totals[name] = totals.get(name, 0.0) + float(term.total)
    for name, count in units.items():
        assert (totals[name] == 0) == (count == 0)
        assert count == 0 or totals[name] / count == pytest.approx(1.0, abs=0.3)
    if all(units.values()):
        [line] = train(made.recipe, display=Display(quiet=True)).metrics()
        assert {"loss/ross", "loss/ross_generative"} <= line.keys()
    else:  # a head that nothing trains is not passed over in silence
        with pytest.raises(TrainingError, match=f"'{min(units, key=units.__getitem__)}' is to be trained"):
            train(made.recipe, display=Display(quiet=True))
