"""From a conversation to a sample: tokens, labels and image records first, pictures only when they are needed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from foveate.data.dataset import SampleError
from foveate.data.images import content_box, open_image, to_pixels
from foveate.data.templates import Template, encode
from foveate.errors import DataError
from foveate.types import IGNORE_INDEX, IMAGE_PLACEHOLDER, Conversation, EncoderSpec, Geometry, ImageRecord, Sample


@dataclass(frozen=True, eq=False)
class SampleRules:
    """All that turns conversations into samples: what the model is made of, as numbers, not as modules.

    `visual_grid`: of one image. A sample longer than `max_length` is an error, dropped, or cut after an earlier answer.
    """

    tokenizer: Any
    template: Template
    encoder: EncoderSpec
    visual_grid: tuple[int, int]
    geometry: Geometry = "pad"
    max_length: int = 2048
    on_long: Literal["error", "drop", "cut"] = "error"

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


def build_sample(conversation: Conversation, rules: SampleRules) -> Sample:
    """Tokens, labels and image records of a conversation; no picture is opened.

    Without turns the sample is its visual tokens, after BOS if the tokenizer has one, and nothing is supervised. Raises
    `SampleError`: placeholders that do not match the images, no or an empty answer, nothing supervised, over-long.
    """
    for defect in defects(conversation):
        raise defect
    where, sample = f"sample '{conversation.id}'", _tokenize(conversation, rules)
    if conversation.turns and not sample.supervised:
        raise SampleError("unsupervised", where, f"has no supervised token in template '{rules.template.name}'")
    if sample.length <= rules.max_length:
        return sample
    ends = [end for end, turn in enumerate(conversation.turns[:-1], 1) if turn.role == "assistant"]
    for end in reversed(ends if rules.on_long == "cut" else []):
        shorter = _tokenize(replace(conversation, turns=conversation.turns[:end]), rules)
        if shorter.length <= rules.max_length and shorter.supervised:
            return shorter
    advice = {"cut": "even its first answer ends later", "error": "raise it, or set on_long_sample: drop or cut"}
    reason = advice.get(rules.on_long, "on_long_sample is 'drop'")
    raise SampleError("long", where, f"has {sample.length} tokens, max_length is {rules.max_length} ({reason})")


def load_pixels(sample: Sample, rules: SampleRules) -> Sample:
    """The sample with its pictures opened: `pixels` filled, each record with its content box.

    Raises `SampleError` of kind "image" for a picture that is missing or cannot be read.
    """
    opened = [open_image(ref, f"sample '{sample.id}'") for ref in sample.refs]
    boxes = [content_box(image.size, rules.geometry) for image in opened]
    images = [replace(record, content=box) for record, box in zip(sample.images, boxes, strict=True)]
    return replace(sample, images=images, pixels=[to_pixels(i, rules.encoder, rules.geometry) for i in opened])


def _placeholders(conversation: Conversation) -> int:
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns)


def _tokenize(conversation: Conversation, rules: SampleRules) -> Sample:
    """Encode the turns, make each image token a run of visual tokens, and record where the run starts.

    Where a conversation was cut, input images beyond its last placeholder go with the turns that showed them.
    """
    where, bos, image = f"sample '{conversation.id}'", rules.tokenizer.bos_token_id, rules.image_token_id
    shown = _placeholders(conversation) if conversation.turns else sum(r.role == "input" for r in conversation.images)
    ids = ([] if bos is None else [bos]) + [image] * shown
    supervised = [False] * len(ids)
    if conversation.turns:
        try:
            ids, supervised = encode(rules.template, rules.tokenizer, conversation.turns)
        except DataError as error:
            raise SampleError("row", where, str(error)) from None
    labels = [token if learned else IGNORE_INDEX for token, learned in zip(ids, supervised, strict=True)]
    visual = math.prod(rules.visual_grid)
    starts = [at + n * (visual - 1) for n, at in enumerate(at for at, token in enumerate(ids) if token == image)]
    for start in starts:
        ids[start : start + 1] = [image] * visual
        labels[start : start + 1] = [IGNORE_INDEX] * visual
    if len(starts) != shown:
        problem = f"has {shown} placeholders; template '{rules.template.name}' made {len(starts)} image tokens of them"
        raise SampleError("placeholders", where, problem)
    kept = [(index, ref) for index, ref in enumerate(conversation.images) if ref.role == "input"][:shown]
    kept += [(index, ref) for index, ref in enumerate(conversation.images) if ref.role == "target"]
    places = zip(kept, starts + [-1] * (len(kept) - shown), strict=True)
    images = [ImageRecord(conversation.id, index, ref.role, rules.visual_grid, at) for (index, ref), at in places]
    ids_L, labels_L = torch.from_numpy(np.array(ids)), torch.from_numpy(np.array(labels))  # faster than torch.tensor
    return Sample(conversation.id, ids_L, labels_L, images, tuple(ref for _, ref in kept), meta=conversation.meta)
