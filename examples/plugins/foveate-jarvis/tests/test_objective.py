"""The objective keeps foveate's contract, its loss is the formula, its blocks see what they may."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foveate_jarvis.objective import Jarvis

import foveate
from foveate.testing import check_objective

TEACHER_WIDTH = 5
TEACHER = {
    "type": "features",
    "encoder": {
        "config": {
            "model_type": "dinov2", "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
            "mlp_ratio": 2, "image_size": 24, "patch_size": 4,
        },
        "layer": -1,
    },
}  # fmt: skip
"""A DINOv2 with random weights, of another grid than the model's encoder."""


@pytest.mark.parametrize("teacher", ["features", TEACHER], ids=["the model's encoder", "its own encoder"])
def test_it_keeps_the_contract(teacher: Any) -> None:
    check_objective("jarvis", {"teacher": teacher}, gradient_to=("head", "projector", "llm"))


class Stub:
    """What `jarvis` asks of a teacher's class."""

    @classmethod
    def describe(cls, options: Any, context: foveate.ObjectiveContext) -> foveate.TeacherSpec:
        return foveate.TeacherSpec(TEACHER_WIDTH, context.visual_grid, (8, 8))


def options(**given: Any) -> Any:
    return Jarvis.Options.model_construct(teacher=SimpleNamespace(cls=Stub, options=None), **given)


def context(grid: tuple[int, int], layers: int = 8) -> foveate.ObjectiveContext:
    spec = foveate.EncoderSpec(image_size=26, grid=grid, width=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return foveate.ObjectiveContext("jarvis", 7, layers, grid, spec)


def images(grids: list[tuple[int, int]]) -> list[foveate.ImageRows]:
    made, start = [], 0
    for number, (rows, columns) in enumerate(grids):
        record = foveate.ImageRecord(f"sample{number}", 0, "input", (rows, columns), start)
        made.append(foveate.ImageRows(record, slice(start, start + rows * columns)))
        start += rows * columns
    return made


def test_the_loss_is_the_mean_of_one_minus_cosine_over_the_targets_of_each_image() -> None:
    """Images of different grids, the MLP with the exact GELU and the cosine in plain Python, in float64."""
    grids = [(3, 3), (6, 6), (4, 9), *[(13, 13)] * 6]  # the largest have tokens that are in neither
    shown, tokens = images(grids), sum(h * w for h, w in grids)
    moment = foveate.Moment(seed=int(torch.randint(1 << 30, ())), stage="align", step=3)
    objective = Jarvis(options(), context(grids[0])).double()
    inputs, states = (torch.randn(tokens, 7, dtype=torch.float64) for _ in range(2))
    features = torch.randn(tokens, TEACHER_WIDTH, dtype=torch.float64)
    untouched = torch.zeros(tokens, dtype=torch.bool)

    edit = objective.edit_visual_tokens(foveate.EditInputs(shown, "jarvis", moment, inputs, untouched))
    assert torch.equal(edit.edited, (edit.groups >= 1) & (edit.groups <= 4))
    assert edit.keep_norm and torch.equal(edit.tokens, objective.mask.expand(tokens, -1))

    outputs = foveate.Outputs.of(
        [image.record for image in shown], {0.25: states}, visual_tokens=inputs, edited=edit.edited,
        pixels=torch.randn(len(grids), 3, 26, 26), moment=moment, objective="jarvis",
    )  # fmt: skip
    targets = foveate.Targets([{"features": part} for part in outputs.split(features)], shown)

    expected = 0.0
    for image in shown:
        hidden = [row for row in range(image.rows.start, image.rows.stop) if edit.edited[row]]
        cosines = [_cosine(_head(objective, states[row].tolist()), features[row].tolist()) for row in hidden]
        expected += 1 - sum(cosines) / len(hidden)

    term = objective.loss(outputs, targets, edit.state)
    assert math.isclose(term.total.item(), expected, rel_tol=1e-12)
    total, count = term.metrics["cosine"]
    assert count == len(grids) and math.isclose(float(total), count - expected, rel_tol=1e-12)
    assert sum(Jarvis.count(objective.options, image.record) for image in shown) == count

    with torch.no_grad():
        pictures = objective.visualize(outputs, targets, edit.state)
    assert [(picture.image.size, picture.image.mode) for picture in pictures] == [((52, 26), "RGB")] * len(grids)
    for picture, image in zip(pictures, shown, strict=True):
        rows, columns = image.record.grid
        for row in range(rows * columns):
            across, down = (26 * (row % columns) + 13) // columns, (26 * (row // columns) + 13) // rows
            left, right = (picture.image.getpixel((across + offset, down)) for offset in (0, 26))
            hidden = bool(edit.edited[image.rows.start + row])
            assert (left == (128, 128, 128)) >= hidden and (right == (0, 0, 0)) >= (not hidden)


def _head(objective: Jarvis, state: list[float]) -> list[float]:
    def linear(layer: Any, values: list[float]) -> list[float]:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(w * x for w, x in zip(weights, values, strict=True)) + bias for weights, bias in rows]

    within = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in linear(objective.head[0], state)]
    return linear(objective.head[2], within)


def _cosine(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True)) / math.hypot(*first) / math.hypot(*second)


def test_what_leaves_nothing_to_predict_from_is_refused() -> None:
    with pytest.raises(foveate.FoveateError, match=r"objectives\.jarvis\.layer: 0\.25 of 2 layers is the input"):
        Jarvis(options(), context((6, 6), layers=2))
    with pytest.raises(foveate.FoveateError, match=r"can hide all of \(2, 2\) visual tokens"):
        Jarvis(options(), context((2, 2)))
    Jarvis(options(layer=-1), context((6, 6), layers=2))
    Jarvis(options(layer=1), context((3, 3), layers=2))


def test_it_sits_out_a_fifth_of_the_steps() -> None:
    given = options()
    active = sum(given.takes_part("jarvis", foveate.Moment(5, "align", step)) for step in range(2000))
    assert 0.77 < active / 2000 < 0.83
