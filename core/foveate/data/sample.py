"""From a conversation to a sample: tokens, labels and image records first, pictures only when they are needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.data.dataset import SampleError
from foveate.data.images import aligned, content_box, covered, open_image, to_pixels
from foveate.data.templates import Template, encode
from foveate.data.views import ObjectiveRule, prepare_views
from foveate.errors import DataError
from foveate.types import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    Conversation,
    EncoderSpec,
    Geometry,
    ImageRecord,
    ImageRef,
    Sample,
)


@dataclass(frozen=True, eq=False)
class SampleRules:
    """All that turns conversations into samples: what the model is made of, as numbers, not as modules.

    `visual_grid`: of one image. A sample longer than `max_length` is an error, dropped, or cut after an earlier answer.
    `objectives`: the active ones. `shows`: every packed row needs an image (its encoder or projector is trained).
    """

    tokenizer: Any
    template: Template
    encoder: EncoderSpec
    visual_grid: tuple[int, int]
    geometry: Geometry = "pad"
    max_length: int = 2048
    on_long: Literal["error", "drop", "cut"] = "error"
    objectives: tuple[ObjectiveRule, ...] = ()
    shows: bool = False

    @cached_property
    def image_token_id(self) -> int:
        """The id of `<image>`: as many stand for an image as it has visual tokens."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER))


def defects(conversation: Conversation) -> Iterator[SampleError]:
    """What is wrong with a conversation before it is tokenized: every defect."""
    where, turns = f"sample '{conversation.id}'", conversation.turns
    shown = sum(ref.role == "input" for ref in conversation.images)
    placeholders, answers = _placeholders(conversation), [turn.text for turn in turns if turn.role == "assistant"]
    if turns and placeholders != shown:
        problem = f"has {placeholders} {IMAGE_PLACEHOLDER} placeholders but {shown} images of role input"
        yield SampleError("placeholders", where, problem)
    if turns and not answers:
        yield SampleError("answer", where, "has no answer: no turn of the assistant")
    if not turns and not shown:
        yield SampleError("answer", where, "has neither turns nor an image to show to the model")
    if empty := sum(not text.strip() for text in answers):
        yield SampleError("answer", where, f"has an empty answer ({empty} of {len(answers)})")


def build_sample(conversation: Conversation, rules: SampleRules, allowed: Sequence[str] | None = None) -> Sample:
    """Tokens, labels and image records of a conversation; no picture is opened. `allowed`: objectives, None: all.

    Without turns the sample is its visual tokens, after BOS if the tokenizer has one, and nothing is supervised. Raises
    `SampleError`: placeholders that do not match the images, no or an empty answer, nothing supervised, over-long.
    """
    for defect in defects(conversation):
        raise defect
    where, sample = f"sample '{conversation.id}'", _tokenize(conversation, rules, allowed)
    if conversation.turns and not sample.supervised:
        raise SampleError("unsupervised", where, f"has no supervised token in template '{rules.template.name}'")
    if sample.length <= rules.max_length:
        return sample
    ends = [end for end, turn in enumerate(conversation.turns[:-1], 1) if turn.role == "assistant"]
    for end in reversed(ends if rules.on_long == "cut" else []):
        shorter = _tokenize(replace(conversation, turns=conversation.turns[:end]), rules, allowed)
        if shorter.length <= rules.max_length and shorter.supervised:
            return shorter
    advice = {"cut": "even its first answer ends later", "error": "raise it, or set on_long_sample: drop or cut"}
    reason = advice.get(rules.on_long, "on_long_sample is 'drop'")
    raise SampleError("long", where, f"has {sample.length} tokens, max_length is {rules.max_length} ({reason})")


def build_prompt(conversation: Conversation, rules: SampleRules) -> Sample:
    """Tokens and image records of a conversation that ends with a question, up to where its answer begins.

    Raises `SampleError` for placeholders that do not match the images, and where the template leaves nothing to read.
    """
    for defect in defects(conversation):
        if defect.kind == "placeholders":
            raise defect
    sample = _tokenize(conversation, rules, (), ask=True)
    if not sample.length:
        where = f"sample '{conversation.id}'"
        raise SampleError("row", where, f"template '{rules.template.name}' makes an empty prompt of it")
    return sample


def load_pixels(sample: Sample, rules: SampleRules) -> Sample:
    """The sample with its pictures opened: `pixels` and `views` filled, each record with its content box.

    Raises `SampleError` of kind "image" for a picture that is missing or cannot be read.
    """
    opened = [open_image(ref, f"sample '{sample.id}'") for ref in sample.refs]
    down, across = covered(rules.encoder)
    images = list[ImageRecord]()
    for record, image in zip(sample.images, opened, strict=True):
        left, top, right, bottom = content_box(image.size, rules.geometry)
        box = (left / across, top / down, min(1.0, right / across), min(1.0, bottom / down))
        images.append(replace(record, content=box))
    pixels = [to_pixels(image, rules.encoder, rules.geometry) for image in opened]
    views = list[Mapping[str, Mapping[str, Tensor]]]()
    if any(rule.view for rule in rules.objectives):
        raw = [aligned(image, rules.encoder, rules.geometry) for image in opened]
        views = [prepare_views(image, record, rules.objectives) for image, record in zip(raw, images, strict=True)]
    return replace(sample, images=images, pixels=pixels, views=views)


@lru_cache(maxsize=32)
def dummy_sample(rules: SampleRules, objectives: tuple[str, ...] = ()) -> Sample:
    """A picture of noise that stands in where a row has no image, also for each of `objectives`; it counts zero."""
    side, noise = rules.encoder.image_size, torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (side, side, 3), generator=noise, dtype=torch.uint8)
    picture, roles = Image.fromarray(values.numpy()), {rule.cls.role for rule in rules.objectives}
    refs = [ImageRef(picture, role) for role in ("input", "target") if role in {"input", *roles}]
    sample = load_pixels(build_sample(Conversation("dummy", (), tuple(refs)), rules, objectives), rules)
    return replace(sample, images=[replace(record, dummy=True) for record in sample.images])


def stand_ins(samples: Sequence[Sample], rules: SampleRules) -> list[Sample]:
    """What a packed row of `samples` lacks: nothing, or one dummy sample for the model and some objectives."""
    records = [record for sample in samples for record in sample.images]
    present = {name for record in records for name in record.objectives}
    absent = tuple(rule.name for rule in rules.objectives if rule.name not in present)
    unseen = rules.shows and not any(record.role == "input" for record in records)
    return [dummy_sample(rules, absent)] if absent or unseen or not samples else []


def _placeholders(conversation: Conversation) -> int:
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns)


def _tokenize(
    conversation: Conversation, rules: SampleRules, allowed: Sequence[str] | None, ask: bool = False
) -> Sample:
    """Encode the turns, make each image token a run of visual tokens, and record where the run starts.

    Where a conversation was cut, input images beyond its last placeholder go with the turns that showed them.
    """
    where, bos, image = f"sample '{conversation.id}'", rules.tokenizer.bos_token_id, rules.image_token_id
    shown = _placeholders(conversation) if conversation.turns else sum(r.role == "input" for r in conversation.images)
    ids = ([] if bos is None else [bos]) + [image] * shown
    supervised = [False] * len(ids)
    if conversation.turns:
        try:
            ids, supervised = encode(rules.template, rules.tokenizer, conversation.turns, ask)
        except DataError as error:
            raise SampleError("row", where, str(error)) from None
    labels = [token if learned else IGNORE_INDEX for token, learned in zip(ids, supervised, strict=True)]
    places = [at for at, token in enumerate(ids) if token == image]
    if len(places) != shown:
        problem = f"has {shown} placeholders; template '{rules.template.name}' made {len(places)} image tokens of them"
        raise SampleError("placeholders", where, problem)
    kept = [(index, ref) for index, ref in enumerate(conversation.images) if ref.role == "input"][:shown]
    kept += [(index, ref) for index, ref in enumerate(conversation.images) if ref.role == "target"]
    images, grown = list[ImageRecord](), 0
    for number, (index, ref) in enumerate(kept):
        start = places[number] + grown if number < shown else len(ids)
        record = _record(conversation.id, index, ref, start, rules, allowed)
        added = record.tokens + sum(count for _, count in record.extra.values())
        ids[start : start + (number < shown)] = [image] * added
        labels[start : start + (number < shown)] = [IGNORE_INDEX] * added
        grown += added - 1
        images.append(record)
    ids_L, labels_L = torch.from_numpy(np.array(ids)), torch.from_numpy(np.array(labels))  # faster than torch.tensor
    return Sample(conversation.id, ids_L, labels_L, images, tuple(ref for _, ref in kept), meta=conversation.meta)


def _record(
    sample_id: str, index: int, ref: ImageRef, start: int, rules: SampleRules, allowed: Sequence[str] | None
) -> ImageRecord:
    """The record of an image that begins at `start`, with the objectives that it is for and their extra tokens."""
    shown = ref.role == "input"
    at, opens = (start, start == 0) if shown else (-1, False)
    record = ImageRecord(sample_id, index, ref.role, rules.visual_grid, at, opens=opens)
    mine = [rule for rule in rules.objectives if rule.applies(record, allowed)]
    record, extra, place = replace(record, objectives=tuple(rule.name for rule in mine)), {}, start + record.tokens
    for rule in mine:
        if count := rule.extra(record):
            extra[rule.name] = (place, count)
            place += count
    return replace(record, extra=extra)
