"""Packing samples end to end into one row, and dealing a step's samples to ranks and micro-batches."""

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from foveate.data.views import ObjectiveRule, rows_of
from foveate.types import IGNORE_INDEX, Batch, ImageRecord, Sample


def pack(samples: Sequence[Sample], objectives: Sequence[ObjectiveRule] = ()) -> Batch:
    """One row of whole samples, longest first, so that equal lengths, which share a kernel call, stand side by side.

    Labels move by one here: a position's target is its *next* token, and never a token of the next sample.
    """
    samples = sorted(samples, key=lambda sample: -sample.length)
    lengths = [sample.length for sample in samples]
    *starts, total = [0, *accumulate(lengths)]
    firsts, sizes = torch.tensor(starts), torch.tensor(lengths)
    labels = torch.cat([sample.labels for sample in samples])
    labels[firsts] = IGNORE_INDEX
    supervised = (labels != IGNORE_INDEX).nonzero().flatten()
    records = [(record, start) for sample, start in zip(samples, starts, strict=True) for record in sample.images]
    images = [_moved(record, start) for record, start in records]
    visual = [torch.arange(record.start, record.start + record.tokens) for record in images]
    pixels = [picture for sample in samples for picture in sample.pixels]
    return Batch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        position_ids=torch.arange(total) - firsts.repeat_interleave(sizes),
        lengths=tuple(lengths),
        target_positions=supervised - 1,
        target_ids=labels[supervised],
        sample_targets=torch.arange(len(samples)).repeat_interleave(sizes)[supervised],
        pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
        visual_positions=torch.cat([torch.arange(0), *visual]),
        images=images,
        sample_ids=[sample.id for sample in samples],
        metas=[sample.meta for sample in samples],
        prompts=tuple(_prompt(sample) for sample in samples),
        rows={rule.name: rows for rule in objectives if (rows := rows_of(rule, images)) is not None},
        views=[views for sample in samples for views in sample.views or [{}] * len(sample.images)],
        dummy=all(sample.images and sample.images[0].dummy for sample in samples),
    )


def _moved(record: ImageRecord, start: int) -> ImageRecord:
    """The record with positions counted in the row."""
    extra = {name: (place + start, count) for name, (place, count) in record.extra.items()}
    return replace(record, start=record.start + start * (record.role == "input"), extra=extra)


def _prompt(sample: Sample) -> int:
    """Tokens before the first supervised one; all where there is none."""
    supervised = (sample.labels != IGNORE_INDEX).nonzero()
    return int(supervised[0]) if len(supervised) else sample.length


def deal(lengths: Sequence[int], world: int, budget: int) -> list[list[list[int]]]:
    """Who computes what: for each rank its micro-batches, for each of those the indices into `lengths`.

    Every rank gets the same number of micro-batches, the smallest at which longest-first dealing to the emptiest one
    keeps all within `budget` tokens; a sample longer than that has one to itself. Some may be empty. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rounds = max(1, -(-sum(min(length, budget) for length in lengths) // (world * budget)))
    while True:
        bins: list[list[int]] = [[] for _ in range(world * rounds)]
        heap = [(0, number) for number in range(len(bins))]
        for index in order:
            load, number = heap[0]
            if load and load + lengths[index] > budget:
                break
            bins[number].append(index)
            heapq.heapreplace(heap, (load + lengths[index], number))
        else:
            return [bins[rank::world] for rank in range(world)]
        rounds += 1
