"""Shift 1 reads the state before each visual token of the same sample, or drops the row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.data.packing import pack
from foveate.data.views import ObjectiveRule, counts_of
from foveate.learner import Learner
from foveate.model.build import Blueprint, PartPlan, build_lmm
from foveate.model.encoder import TransformersEncoder
from foveate.model.language import TransformersLLM
from foveate.model.lmm import LMM
from foveate.model.projector import MLPProjector
from foveate.objective import LossTerm, ObjectiveContext, ObjectiveOptions, Outputs, Reads, Targets, VisionObjective
from foveate.types import Sample
from tests.models import GRID, IMAGE_TOKEN, llm_config, make_sample, vision_config


class Shifted(VisionObjective):
    """Keeps what it sees."""

    class Options(ObjectiveOptions):
        """Test."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 1)
        self.seen: list[tuple[Outputs, Tensor]] = []

    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(shift=1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        self.seen.append((outputs, outputs.states()))
        return LossTerm(self.head(outputs.states()).square().sum())


def tiny_lmm() -> LMM:
    torch.manual_seed(0)
    vision = {key: value for key, value in vision_config("siglip").items() if key != "initializer_range"}
    made: dict[str, PartPlan] = {}
    for name, cls, options in (
        ("encoder", TransformersEncoder, {"config": vision}),
        ("projector", MLPProjector, {"depth": 2}),
        ("llm", TransformersLLM, {"config": llm_config("qwen2")}),
    ):
        made[name] = PartPlan(name, cls, cls.Options.model_validate(options))
    return build_lmm(Blueprint(made), None).double()


def learner_of(lmm: LMM) -> tuple[Learner, Shifted]:
    context = ObjectiveContext("shifted", lmm.llm.width, 2, GRID, lmm.encoder.spec)
    objective = Shifted(Shifted.Options(), context).double()
    return Learner(lmm, {"shifted": objective}), objective


def samples(seed: int) -> list[Sample]:
    """Image first, image only, text before, two images, two adjacent ones, text only."""
    generator = torch.Generator().manual_seed(seed)
    layouts: list[list[int | str]] = [
        ["image", 5], ["image"], [4, "image", 3], ["image", 2, "image"], [2, "image", "image"], [6],
    ]  # fmt: skip
    made = [make_sample(f"s{number}", layout, generator) for number, layout in enumerate(layouts)]
    return [
        replace(
            sample,
            images=[replace(record, objectives=("shifted",), opens=record.start == 0) for record in sample.images],
            pixels=[picture.double() for picture in sample.pixels],
        )
        for sample in made
    ]


def test_shift_one_never_reads_another_sample_and_drops_one_row() -> None:
    lmm, made = tiny_lmm(), samples(torch.seed() % 1000)
    learner, objective = learner_of(lmm)
    rule = learner.rules["shifted"]
    visual = GRID[0] * GRID[1]
    assert counts_of(made, [rule]) == {"shifted": 7 * visual - 3}

    batch = pack(made, [rule])
    learner(batch)
    outputs, states = objective.seen[-1]
    assert len(states) == 7 * visual - 3
    by_sample = {sample.id: sample for sample in made}
    for image in outputs.images:
        sample = by_sample[image.record.sample_id]
        record = next(entry for entry in sample.images if entry.index == image.record.index)
        alone = pack([sample], [rule])
        expected = lmm(alone)  # of the sample by itself: nothing of another sample can be in it
        first = max(record.start, 1)
        torch.testing.assert_close(
            states[image.rows], expected[first - 1 : record.start + visual - 1], rtol=1e-9, atol=1e-9
        )
        assert image.dropped == (record.start == 0)


def test_dropped_rows_leave_targets_valid_and_tokens_alike() -> None:
    lmm, made = tiny_lmm(), samples(1)
    learner, _ = learner_of(lmm)
    batch = pack(made, [learner.rules["shifted"]])
    seen = learner.look(batch)["shifted"].outputs
    rows = sum(image.rows.stop - image.rows.start for image in seen.images)
    assert len(seen.visual_tokens) == len(seen.edited) == len(seen.valid) == rows
    tokens = torch.arange(len(seen.images) * GRID[0] * GRID[1]).double()[:, None]
    records = [{"x": part} for part in tokens.split(GRID[0] * GRID[1])]
    aligned = Targets(records, seen.images).rows("x")
    assert torch.equal(aligned, seen.on_visual_grid(tokens, GRID)) and len(aligned) == rows
    for image in seen.images:
        assert aligned[image.rows][0, 0] == records[seen.images.index(image)]["x"][image.dropped, 0]
    whole = pack(made, [replace_shift(learner.rules["shifted"])])
    assert len(whole.rows["shifted"].read) == rows + 3


def replace_shift(rule: ObjectiveRule) -> ObjectiveRule:
    class Unshifted(Shifted):
        @classmethod
        def reads(cls, options: Any) -> Reads:
            return Reads()

    return ObjectiveRule(rule.name, Unshifted, rule.options)


def perturbed(sample: Sample) -> Sample:
    """Other pictures and other text of the same lengths."""
    ids = torch.where(sample.input_ids == IMAGE_TOKEN, IMAGE_TOKEN, 9)
    return replace(sample, input_ids=ids, pixels=[picture + 1 for picture in sample.pixels])


def test_the_first_position_of_a_sample_reads_no_neighbour() -> None:
    """Perturbing one sample changes not one bit of what an objective reads of another."""
    lmm, made = tiny_lmm(), samples(2)
    learner, _ = learner_of(lmm)
    rule = learner.rules["shifted"]
    before = learner.look(pack(made, [rule]))["shifted"].outputs
    for victim in range(len(made)):
        changed = [perturbed(sample) if number == victim else sample for number, sample in enumerate(made)]
        after = learner.look(pack(changed, [rule]))["shifted"].outputs
        for old, new in zip(before.images, after.images, strict=True):
            same = torch.equal(before.states()[old.rows], after.states()[new.rows])
            assert same == (old.record.sample_id != made[victim].id)
