"""What the loader does for objectives: which images they apply to, what these count, and what is read of a row."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError, PluginError
from foveate.objective import ImageRows, ObjectiveOptions, Reads, VisionObjective
from foveate.types import ImageRecord, Sample


@dataclass(frozen=True)
class ObjectiveRule:
    """An active objective as the loader knows it: its name in the recipe, its class and its options, no weights."""

    name: str
    cls: type[VisionObjective]
    options: ObjectiveOptions

    @functools.cached_property
    def reads(self) -> Reads:
        """What it reads, the layers of its teacher included."""
        reads, teacher = self.call("reads"), getattr(self.options, "teacher", None)
        layers = () if teacher is None else teacher.cls.encoder_layers(teacher.options)
        return replace(reads, teacher=tuple(dict.fromkeys((*reads.teacher, *layers))))

    @functools.cached_property
    def view(self) -> str:
        """The key of its prepared pictures; objectives with the same teacher share them. Empty: it prepares none."""
        if self.cls.prepare_image.__func__ is not VisionObjective.prepare_image.__func__:  # type: ignore[attr-defined]
            return self.name
        teacher = getattr(self.options, "teacher", None)
        return "" if teacher is None else json.dumps(teacher.resolved(), sort_keys=True)

    def applies(self, record: ImageRecord, allowed: Sequence[str] | None) -> bool:
        """Whether an image is for it; `allowed`: objectives that the image's source is for, None: all."""
        return record.role == self.cls.role and (allowed is None or self.name in allowed)

    def count(self, record: ImageRecord) -> float:
        """Units of the loss that the image brings. Raises `PluginError` for what is no number."""
        units = self.call("count", record)
        if not isinstance(units, int | float) or not math.isfinite(units) or units < 0:
            raise PluginError(f"objective '{self.name}': count must return a number from 0 on, not {units!r}")
        return float(units)

    def extra(self, record: ImageRecord) -> int:
        """Its extra tokens after the image."""
        return int(self.call("extra_tokens", record))

    def prepare(self, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """The teacher's view of a picture."""
        views: dict[str, Tensor] = self.call("prepare_image", image, record)
        return views

    def call(self, method: str, *arguments: Any) -> Any:
        """A class method of the objective; what it raises becomes a `PluginError` with the objective's name."""
        try:
            return getattr(self.cls, method)(self.options, *arguments)
        except FoveateError:
            raise
        except Exception as error:
            where = f"{self.cls.__module__}.{self.cls.__qualname__}.{method}"
            raise PluginError(f"objective '{self.name}' failed in {where}: {error!r}") from error


@dataclass(frozen=True)
class ObjectiveRows:
    """Where an objective's images lie in a packed row.

    `numbers`: which of the batch's images they are; `images`: their rows as the loss sees them, `whole`: as an editor
    does (nothing dropped). Index tensors: `visual` `[R]` into the row's visual tokens and `read` `[R]` into its
    positions, for the loss (`read` is shifted); `edited` into the visual tokens, for an editor; `extra` into positions.
    `dummy`: the images are stand-ins.
    """

    numbers: tuple[int, ...]
    images: tuple[ImageRows, ...]
    whole: tuple[ImageRows, ...]
    visual: Tensor
    read: Tensor
    edited: Tensor
    extra: Tensor
    dummy: bool


def rows_of(rule: ObjectiveRule, images: Sequence[ImageRecord]) -> ObjectiveRows | None:
    """The rows of the images that are for an objective, the real ones, or else the stand-ins; None without any."""
    mine = [number for number, record in enumerate(images) if rule.name in record.objectives]
    numbers = [number for number in mine if not images[number].dummy] or mine
    if not numbers:
        return None
    shift, firsts = rule.reads.shift, [0, *accumulate(record.tokens for record in images)]
    seen, whole = list[ImageRows](), list[ImageRows]()
    visual, read, edited, extra = ([torch.arange(0)] for _ in range(4))
    row = all_rows = extra_row = 0
    for number in numbers:
        record, first = images[number], firsts[number]
        dropped = record.tokens - record.rows(shift)
        start, length = record.extra.get(rule.name, (0, 0))
        extras = slice(extra_row, extra_row + length)
        seen.append(ImageRows(record, slice(row, row + record.rows(shift)), extras, dropped))
        whole.append(ImageRows(record, slice(all_rows, all_rows + record.tokens), extras))
        visual.append(torch.arange(first + dropped, first + record.tokens))
        read.append(torch.arange(record.start + dropped - shift, record.start + record.tokens - shift))
        edited.append(torch.arange(first, first + record.tokens))
        extra.append(torch.arange(start, start + length))
        row, all_rows, extra_row = row + record.rows(shift), all_rows + record.tokens, extras.stop
    return ObjectiveRows(
        tuple(numbers),
        tuple(seen),
        tuple(whole),
        visual=torch.cat(visual),
        read=torch.cat(read),
        edited=torch.cat(edited),
        extra=torch.cat(extra),
        dummy=images[numbers[0]].dummy,
    )


def counts_of(samples: Sequence[Sample], rules: Sequence[ObjectiveRule]) -> dict[str, float]:
    """Units of each objective's loss in `samples`; stand-ins count zero."""
    records = [record for sample in samples for record in sample.images if not record.dummy]
    return {rule.name: sum(rule.count(r) for r in records if rule.name in r.objectives) for rule in rules}


def prepare_views(
    image: Image.Image, record: ImageRecord, rules: Sequence[ObjectiveRule]
) -> Mapping[str, dict[str, Tensor]]:
    """View → what `prepare_image` makes of a picture, once for all objectives that share it."""
    makers = {rule.view: rule for rule in rules if rule.name in record.objectives and rule.view}
    return {view: rule.prepare(image, record) for view, rule in makers.items()}
