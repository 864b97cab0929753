"""The loss of ROSS against its formula in float64 with the same noise, for everything that an option can choose."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from foveate import Moment, ObjectiveContext, Outputs, Targets, TeacherInputs
from foveate.learner import Seen
from foveate.testing.models import Bench, build_objective, texture, tiny_lmm
from foveate.types import EncoderSpec, ImageRecord
from tests.plugins.ross import reference
from tests.plugins.ross.reference import TEACHERS, chosen, small

SEED = int(torch.randint(1 << 30, ()))
MOMENT = Moment(SEED, "align", 3)


@functools.cache
def looked(teacher: str, variant: str = "denoise") -> tuple[Bench, Seen]:
    """What the objective sees of a row with three images, under this teacher; tests make heads of their own."""
    options: dict[str, Any] = {"variant": variant, "teacher": TEACHERS[teacher]}
    options |= {"denoiser": small("dit")} if variant == "denoise" else {}
    bench = Bench(chosen(options), tiny_lmm(seed=SEED % 1000), SEED % 1000)
    if (found := bench.teachers.of("ross")) is not None:
        reference.spread(found, SEED)
    with torch.no_grad():
        batch = bench.pack([bench.samples[kind] for kind in ("text only", "two images", "wide picture")])
        return bench, bench.learner.look(batch, MOMENT)["ross"]


def made(bench: Bench, options: dict[str, Any], seed: int = SEED) -> Any:
    """The objective with weights of everyday size."""
    objective = build_objective(chosen(options), bench.lmm, "ross").double()
    reference.spread(objective, seed)
    return objective


CHOICES = [*itertools.product(("cosine", "linear"), ("epsilon", "v", "x0"))]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", ["dit", "vit", "mlp"])
def test_denoising_is_its_formula(kind: str, teacher: str) -> None:
    """Every schedule and prediction, one to three draws, three images of two samples."""
    bench, seen = looked(teacher)
    for number, (schedule, prediction) in enumerate(CHOICES):
        options = {"teacher": TEACHERS[teacher], "denoiser": small(kind), "schedule": schedule, "draws": 1 + number % 3}
        objective = made(bench, {**options, "prediction": prediction})
        with torch.no_grad():
            found = objective.loss(seen.outputs, seen.targets, None)
        expected = reference.loss(objective, seen.outputs, seen.targets)
        assert float(found.total) == pytest.approx(expected, rel=1e-9), (schedule, prediction)
        parts = [float(found.metrics[f"loss_t{quarter}"][0]) for quarter in range(4)]
        counts = [found.metrics[f"loss_t{quarter}"][1] for quarter in range(4)]
        draws = objective.options.draws
        assert sum(parts) == pytest.approx(draws * expected, rel=1e-9)
        assert sum(counts) == draws * len(seen.outputs.states())


@pytest.mark.parametrize(
    ("variant", "teacher", "measure"),
    [
        ("regress_pixels", "raw", "mse"), ("regress_pixels", "patches", "mse"),
        *itertools.product(["regress_latents"], ("kl", "flux", "vq", "features"), ("mse", "cosine")),
        *(("regress_latents_to_pixels", teacher, "mse") for teacher in ("kl", "flux", "vq")),
    ],
)  # fmt: skip
def test_regression_is_its_formula(variant: str, teacher: str, measure: str) -> None:
    bench, seen = looked(teacher, variant)
    for depth, width in ((1, None), (2, None), (3, 9)):
        head = {"depth": depth, "width": width}
        options = {"variant": variant, "teacher": TEACHERS[teacher], "measure": measure, "head": head}
        objective = made(bench, options)
        with torch.no_grad():
            found = objective.loss(seen.outputs, seen.targets, None)
        assert float(found.total) == pytest.approx(reference.loss(objective, seen.outputs, seen.targets), rel=1e-9)


def test_gradients_are_those_of_the_formula() -> None:
    """By differences of the loss along random directions of all weights, and of the LLM's states."""
    bench, seen = looked("kl")
    objective = made(bench, {"teacher": TEACHERS["kl"], "denoiser": small("dit"), "draws": 2})
    rows = seen.outputs.states().clone().requires_grad_()
    records, grid = [image.record for image in seen.outputs.images], (4, 4)
    outputs = Outputs.of(records, {-1: rows}, moment=MOMENT, objective="ross", encoder_grid=grid)
    objective.loss(outputs, seen.targets, None).total.backward()
    step = 1e-6
    along = [(p, torch.randn_like(p)) for p in (*objective.parameters(), rows)]
    slope = sum(float((p.grad * direction).sum()) for p, direction in along)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in along:
                parameter += sign * step * direction
            values.append(reference.loss(objective, outputs, seen.targets))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("kind", ["dit", "vit", "mlp"])
def test_the_first_loss_is_one(kind: str) -> None:
    """A fresh denoiser predicts 0, so that noise prediction starts at the mean square of normal noise."""
    bench, seen = looked("flux")
    options = {"teacher": TEACHERS["flux"], "denoiser": small(kind), "draws": 50}
    objective: Any = build_objective(chosen(options), bench.lmm, "ross").double()
    with torch.no_grad():
        term = objective.loss(seen.outputs, seen.targets, None)
    rows, width = len(seen.outputs.states()), objective.teacher_spec.width
    assert float(term.total) / rows == pytest.approx(1.0, abs=4.5 * math.sqrt(2 / (rows * 50 * width)))


@pytest.mark.parametrize(("llm", "millions"), [(3584, 63.9), (4096, 64.4), (5120, 65.5)])
def test_the_released_denoiser_has_the_released_size(llm: int, millions: float) -> None:
    """24 × 24 tokens of 64 latents; the table of positions, a parameter there, is neither trained nor saved here."""
    from foveate_ross.denoiser import Dit
    from foveate_ross.options import DenoiserOptions

    with torch.device("meta"):
        denoiser = Dit(DenoiserOptions(), 64, llm, (24, 24))
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    assert "positions" not in denoiser.state_dict()


def by_hand(
    options: dict[str, Any], grids: list[tuple[int, int]], boxes: list[tuple[float, float, float, float]],
    edited: torch.Tensor | None = None,
) -> tuple[Any, Outputs, Targets]:  # fmt: skip
    """An objective for the first grid, random states of images of these grids, and targets by its own teacher."""
    spec = EncoderSpec(image_size=16, grid=(4, 4), width=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    of: Any = chosen(options)
    pairs = enumerate(zip(grids, boxes, strict=True))
    records = [ImageRecord(f"s{number}", 0, "input", grid, 0, content=box) for number, (grid, box) in pairs]
    objective: Any = of.cls(of.options, ObjectiveContext("ross", 12, 2, grids[0], spec)).double()
    reference.spread(objective, SEED)
    states = torch.randn(sum(record.tokens for record in records), 12, dtype=torch.float64)
    outputs = Outputs.of(records, {-1: states}, moment=MOMENT, objective="ross", edited=edited)
    made: list[dict[str, torch.Tensor]] = []
    for record in records:
        context = ObjectiveContext("ross", 12, 2, record.grid, spec)
        teacher = of.options.teacher.cls(of.options.teacher.options, context).double().eval()
        picture = texture(np.random.default_rng(SEED), (40, 24))
        views = [objective.prepare_image(of.options, picture, record)]
        with torch.no_grad():
            made += teacher.encode(TeacherInputs([record], views))
    return objective, outputs, Targets(made, outputs.images)


WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["dit", "vit", "mlp"])
def test_grids_need_not_be_square_nor_alike(kind: str) -> None:
    grids = [(2, 5), (4, 3), (2, 5), (1, 7)]
    options = {"teacher": TEACHERS["flux"], "denoiser": small(kind)}
    objective, outputs, targets = by_hand(options, grids, [WHOLE] * 4)
    with torch.no_grad():
        found = objective.loss(outputs, targets, None)
    assert float(found.total) == pytest.approx(reference.loss(objective, outputs, targets), rel=1e-9)
    assert sum(objective.count(objective.options, image.record) for image in outputs.images) == len(outputs.states())


def inside(record: ImageRecord) -> list[bool]:
    """Whether a token's centre lies in the picture."""
    (rows, columns), (left, top, right, bottom) = record.grid, record.content
    centres = [((row + 0.5) / rows, (column + 0.5) / columns) for row in range(rows) for column in range(columns)]
    return [top <= y <= bottom and left <= x <= right for y, x in centres]


BOXES = [(0.0, 0.25, 1.0, 0.75), WHOLE, (0.4, 0.0, 0.6, 1.0), (0.0, 0.52, 1.0, 0.53)]


@pytest.mark.parametrize("variant", ["denoise", "regress_pixels", "regress_latents"])
def test_padding_does_not_count_where_that_is_asked_for(variant: str) -> None:
    """Neither in the loss, nor in its count, nor in metrics; of the last image no token's centre is inside."""
    teacher = TEACHERS["raw" if variant == "regress_pixels" else "kl"]
    options: dict[str, Any] = {"variant": variant, "teacher": teacher}
    options |= {"denoiser": small("dit")} if variant == "denoise" else {}
    for mask in (True, False):
        objective, outputs, targets = by_hand({**options, "mask_padding": mask}, [(4, 4)] * 4, BOXES)
        tokens = [inside(image.record) if mask else [True] * 16 for image in outputs.images]
        with torch.no_grad():
            found = objective.loss(outputs, targets, None)
        assert float(found.total) == pytest.approx(reference.loss(objective, outputs, targets, tokens), rel=1e-9)
        counts = [objective.count(objective.options, image.record) for image in outputs.images]
        assert counts == [sum(each) for each in tokens] and (counts[3] == 0) == mask
        metered = sum(count for _, count in found.metrics.values())
        assert metered == sum(counts) * (objective.options.draws or 1)


@pytest.mark.parametrize("loss_on", ["edited", "unedited"])
def test_the_loss_looks_at_edited_tokens_or_at_the_others(loss_on: str) -> None:
    """Their mean stands for all tokens of the image; where an image has none of them it brings nothing."""
    edited = torch.rand(64) < 0.4
    edited[16:32], edited[32:48] = True, False
    options = {"teacher": TEACHERS["kl"], "variant": "regress_latents", "loss_on": loss_on, "mask_padding": True}
    objective, outputs, targets = by_hand(options, [(4, 4)] * 4, [*BOXES[:3], WHOLE], edited)
    with torch.no_grad():
        found = float(objective.loss(outputs, targets, None).total)
    expected = 0.0
    for number, image in enumerate(outputs.images):
        valid, mine = inside(image.record), edited[16 * number : 16 * number + 16].tolist()
        picked = [good and change == (loss_on == "edited") for good, change in zip(valid, mine, strict=True)]
        only = [picked if other == number else [False] * 16 for other in range(4)]
        if any(picked):
            share = sum(valid) / sum(picked)
            expected += share * reference.loss(objective, outputs, targets, only)
    assert found == pytest.approx(expected, rel=1e-9)
