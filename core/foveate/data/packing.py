"""Packing samples end to end into one row, and dealing a step's samples to ranks and micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from foveate.data.sample import SampleRules
from foveate.types import IGNORE_INDEX, Batch, ImageRecord, Sample

Groups = list[list[int]]


def pack(samples: Sequence[Sample]) -> Batch:
    """One row of whole samples, longest first, so that equal lengths stand side by side (they share a kernel call).

    Labels move by one here: a position's target is its *next* token, and never a token of the next sample.
    """
    samples = sorted(samples, key=lambda sample: -sample.length)
    lengths = [sample.length for sample in samples]
    starts = [0, *accumulate(lengths)]
    firsts = torch.tensor(starts[:-1])
    sizes = torch.tensor(lengths)
    labels = torch.cat([sample.labels for sample in samples])
    labels[firsts] = IGNORE_INDEX
    supervised = (labels != IGNORE_INDEX).nonzero().flatten()
    images: list[ImageRecord] = []
    visual = [torch.empty(0, dtype=torch.long)]
    for sample, start in zip(samples, starts, strict=False):
        for record in sample.images:
            if record.role == "input":
                record = replace(record, start=record.start + start)
                visual.append(torch.arange(record.start, record.start + record.tokens))
            images.append(record)
    pixels = [picture for sample in samples for picture in sample.pixels]
    return Batch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        position_ids=torch.arange(starts[-1]) - firsts.repeat_interleave(sizes),
        lengths=tuple(lengths),
        target_positions=supervised - 1,
        target_ids=labels[supervised],
        sample_targets=torch.arange(len(samples)).repeat_interleave(sizes)[supervised],
        pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
        visual_positions=torch.cat(visual),
        images=images,
        sample_ids=[sample.id for sample in samples],
        metas=[sample.meta for sample in samples],
    )


def dummy_batch(rules: SampleRules) -> Batch:
    """One black image and nothing supervised: what a rank computes, and counts as zero, when it has no sample left."""
    tokens, side = rules.visual_tokens, rules.encoder.image_size
    sample = Sample(
        id="dummy",
        input_ids=torch.full((tokens,), rules.image_token_id),
        labels=torch.full((tokens,), IGNORE_INDEX),
        images=[ImageRecord("dummy", 0, "input", rules.visual_grid, 0)],
        pixels=[torch.zeros(3, side, side)],
    )
    return replace(pack([sample]), dummy=True)


def deal(lengths: Sequence[int], world: int, budget: int) -> list[Groups]:
    """Who computes what: for each rank its micro-batches, for each of those the indices into `lengths`.

    Every rank gets the same number of micro-batches, the smallest at which longest-first dealing to the emptiest one
    keeps all within `budget` tokens; a sample longer than that has one to itself. Some may be empty. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rounds = max(1, -(-sum(lengths) // (world * budget)))
    while True:
        bins: Groups = [[] for _ in range(world * rounds)]
        heap = [(0, number) for number in range(len(bins))]
        fits = True
        for index in order:
            load, number = heap[0]
            fits = fits and (load == 0 or load + lengths[index] <= budget)
            bins[number].append(index)
            heapq.heapreplace(heap, (load + lengths[index], number))
        if fits:
            return [bins[rank::world] for rank in range(world)]
        rounds += 1
