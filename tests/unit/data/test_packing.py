"""Packing and dealing: a packed row says what its samples say, and every sample is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.packing import deal, pack
from foveate.data.sample import SampleRules, build_sample, load_pixels, stand_ins
from foveate.types import IGNORE_INDEX, Conversation, Sample


def test_a_packed_row_says_what_its_samples_say(
    talk: Callable[..., Conversation], make_rules: Callable[..., SampleRules], digits: list[Image.Image]
) -> None:
    rules = make_rules()
    talks = [
        talk("q", "a", id="text"),
        talk("<image>\nWhat digit?", "It is 3", "Sure?", "Yes", images=digits[:1], id="one"),
        talk("<image><image>", "two", images=digits[1:3], targets=digits[3:4], id="two"),
        talk(images=digits[4:5], id="only"),
    ]
    samples = [load_pixels(build_sample(conversation, rules), rules) for conversation in talks]
    labels = [sample.labels.clone() for sample in samples]
    batch = pack(samples)
    assert all(torch.equal(sample.labels, before) for sample, before in zip(samples, labels, strict=True))
    assert list(batch.lengths) == sorted((sample.length for sample in samples), reverse=True)
    by_id = {sample.id: sample for sample in samples}
    targets, places, owners, visual, seen, at = [], [], [], list[int](), 0, 0
    for number, name in enumerate(batch.sample_ids):  # token by token, against the samples themselves
        sample: Sample = by_id[name]
        for offset in range(sample.length):
            assert batch.input_ids[at + offset] == sample.input_ids[offset]
            assert batch.position_ids[at + offset] == offset
            if offset + 1 < sample.length and sample.labels[offset + 1] != IGNORE_INDEX:
                places.append(at + offset)
                targets.append(int(sample.labels[offset + 1]))
                owners.append(number)
        for record, pixels in zip(sample.images, sample.pixels, strict=True):
            packed = batch.images[seen]
            assert torch.equal(batch.pixels[seen], pixels) and packed.sample_id == name and packed.role == record.role
            assert packed.start == (record.start + at if record.role == "input" else -1)
            visual += range(packed.start, packed.start + packed.tokens)
            seen += 1
        at += sample.length
    assert batch.target_positions.tolist() == places and batch.target_ids.tolist() == targets
    assert batch.sample_targets.tolist() == owners and batch.visual_positions.tolist() == visual
    assert (batch.input_ids[batch.visual_positions] == rules.image_token_id).all()
    assert batch.input_ids.numel() == at == sum(batch.lengths) and seen == len(batch.images) == len(batch.pixels)


def test_labels_never_reach_over_a_border() -> None:
    """A sample whose very first token is labelled: nothing predicts it, least of all the sample before."""
    ids = torch.tensor([7, 8, 9])
    batch = pack([Sample(name, ids, ids.clone(), []) for name in "ab"])
    assert batch.target_positions.tolist() == [0, 1, 3, 4] and batch.target_ids.tolist() == [8, 9, 8, 9]
    assert batch.pixels.shape[0] == 0 and batch.visual_positions.dtype == torch.long


def test_equal_lengths_stand_side_by_side() -> None:
    samples = [Sample(str(size), torch.zeros(size, dtype=torch.long), torch.full((size,), IGNORE_INDEX), [])
               for size in (2, 5, 2, 9, 5, 2)]  # fmt: skip
    assert pack(samples).lengths == (9, 5, 5, 2, 2, 2)


def test_a_dummy_row_counts_nothing(make_rules: Callable[..., SampleRules]) -> None:
    rules = make_rules()
    batch = pack(stand_ins([], rules))
    assert batch.dummy and batch.target_ids.numel() == 0 and batch.pixels.shape == (1, 3, 48, 48)
    assert batch.lengths == (4,) and batch.visual_positions.tolist() == [0, 1, 2, 3]
    assert not pack([build_sample_of(rules)]).dummy


def build_sample_of(rules: SampleRules) -> Any:
    return Sample("x", torch.tensor([1, 2]), torch.tensor([IGNORE_INDEX, 2]), [])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), max_size=40), world=st.integers(1, 5), budget=st.integers(10, 200)
)
def test_dealing_covers_each_sample_once_within_the_budget(lengths: list[int], world: int, budget: int) -> None:
    ranks = deal(lengths, world, budget)
    assert len(ranks) == world and len({len(groups) for groups in ranks}) == 1
    assert sorted(index for groups in ranks for group in groups for index in group) == list(range(len(lengths)))
    for groups in ranks:
        for group in groups:
            assert len(group) <= 1 or sum(lengths[index] for index in group) <= budget
    assert deal(lengths, world, budget) == ranks
    if max(lengths, default=0) <= budget / 2:  # then one round less would have left every micro-batch half full
        assert len(ranks[0]) <= max(1, 2 * sum(lengths) / (world * budget) + 1)


def test_a_giant_sample_does_not_scatter_the_others() -> None:
    assert [[len(group) for group in groups] for groups in deal([10_000, *[10] * 20], 1, 100)] == [[1, 10, 10]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_dealing_is_balanced(world: int) -> None:
    lengths = [100 - number for number in range(64)]
    loads = [sum(lengths[index] for group in groups for index in group) for groups in deal(lengths, world, 100_000)]
    assert max(loads) - min(loads) <= max(lengths) and len(deal(lengths, world, 100_000)[0]) == 1
