"""The objective keeps foveate's contract, and its loss is the formula."""

import math

import torch
from foveate_align.objective import AlignLoss

from foveate import EncoderSpec, ImageRecord, ObjectiveContext, Outputs, Targets
from foveate.testing import check_objective


def test_it_keeps_the_contract() -> None:
    check_objective("align")  # gradients, sums, counts, packing, several images, none at all, saving; it explains


def test_the_loss_is_the_sum_of_one_minus_cosine() -> None:
    """Two images of 2x3 visual tokens against plain Python, in float64."""
    grid, llm_width, width = (2, 3), 5, 4
    spec = EncoderSpec(image_size=6, grid=grid, width=width, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    objective = AlignLoss(AlignLoss.Options(), ObjectiveContext("align", llm_width, 4, grid, spec)).double()
    records = [ImageRecord(name, index=0, role="input", grid=grid, start=0) for name in ("first", "second")]
    states, features = (torch.randn(12, size, dtype=torch.float64) for size in (llm_width, width))
    outputs = Outputs.of(records, {0.5: states}, encoder_states={-1: features}, encoder_grid=grid)

    expected = 0.0
    for state, feature in zip(states.tolist(), features.tolist(), strict=True):
        head = zip(objective.head.weight.tolist(), objective.head.bias.tolist(), strict=True)
        mapped = [sum(w * x for w, x in zip(row, state, strict=True)) + bias for row, bias in head]
        dot = sum(a * b for a, b in zip(mapped, feature, strict=True))
        expected += 1 - dot / math.hypot(*mapped) / math.hypot(*feature)

    term = objective.loss(outputs, Targets([{}, {}], outputs.images), None)
    assert math.isclose(term.total.item(), expected, rel_tol=1e-9)
    total, count = term.metrics["cosine"]
    assert count == 12 and math.isclose(torch.as_tensor(total).item(), 12 - expected, rel_tol=1e-9)
    with torch.no_grad():
        pictures = objective.visualize(outputs, Targets([{}, {}], outputs.images), None)
    assert [picture.image.size for picture in pictures] == [(48, 32), (48, 32)]
