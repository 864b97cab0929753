"""ROSS, reconstructive visual instruction tuning (arXiv 2410.09575): the LLM's states reconstruct what was seen.

Where paper and release disagree, options choose: the denoiser (`denoiser.type`: paper `vit`, release `dit`), the
teacher (paper: a KL-16 autoencoder; release: FLUX's with `patch: 2`), draws of an image (`draws`: release 4, the paper
tells none), the measure of latents (`measure`: the paper says cosine, and in its figure 7 MSE).

What the release lacks holds throughout: every image of a sample counts, each with the same weight whatever it is packed
with; samples without an image bring nothing; grids need not be square; the position table is never trained; teachers
are neither trained nor saved; heads and losses are in float32.

Shapes: I images, N visual tokens of one, D width of the LLM, C of a target row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveate import (
    ImageRecord,
    LossTerm,
    ObjectiveContext,
    Outputs,
    Picture,
    Targets,
    TeacherInputs,
    VisionObjective,
)
from foveate.errors import ModelError
from foveate_ross.groups import Group, groups
from foveate_ross.heads import DecodingHead, DenoisingHead, Head, RegressionHead
from foveate_ross.options import RossOptions
from foveate_ross.pictures import Tile, components, photograph, sheet

TO_PIXELS = "regress_latents_to_pixels"


class Reconstruction(VisionObjective):
    """What reconstructs target rows of images, a row for a visual token, from a condition for each of them.

    A unit of the loss is a visual token. Subclasses make the `head` and say what the conditions are.
    """

    teacher_in_loss = True  # its decoder draws pictures, and is part of one loss
    head: Head

    def __init__(self, options: Any, context: ObjectiveContext) -> None:
        """Raises `ModelError` for a teacher whose rows are not one a visual token."""
        super().__init__(options, context)
        if self.teacher_spec.grid != context.visual_grid:
            rows, tokens = self.teacher_spec.grid, context.visual_grid
            raise ModelError(f"teacher: it makes rows on a grid of {rows}, and visual tokens are on one of {tokens}")

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return int(record.valid().sum()) if options.mask_padding else record.grid[0] * record.grid[1]

    def conditions(self, outputs: Outputs) -> Tensor:
        """`[I*N, D]`: a state for each target row, image after image."""
        raise NotImplementedError

    def weights(self, outputs: Outputs) -> Tensor:
        """`[I*N]` float64 on the CPU: what each token counts; over an image they sum to its `count`, or to 0."""
        valid = torch.cat([image.record.valid() for image in outputs.images])
        return (valid | (not self.options.mask_padding)).double()

    def groups(self, outputs: Outputs, targets: Targets) -> Iterator[Group]:
        """The images by their grids, for the head."""
        conditions = self.conditions(outputs)
        weights = self.weights(outputs).to(conditions.device, conditions.dtype)
        counts = [self.count(self.options, image.record) for image in outputs.images]
        return groups(outputs, targets, conditions, weights, counts)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        terms = [self.head.loss(group) for group in self.groups(outputs, targets)]
        metrics: dict[str, Any] = {
            name: tuple(sum(values) for values in zip(*(term.metrics[name] for term in terms), strict=True))
            for name in terms[0].metrics
        }
        return LossTerm(torch.stack([term.total for term in terms]).sum(), metrics)

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        """Of each image a sheet: the original, what the teacher makes of it (the ceiling), what the model does.

        Where the teacher cannot decode, the last two are its target rows and the model's as colours.
        """
        sheets: dict[int, Picture] = {}
        for group in self.groups(outputs, targets):
            tiles = self._tiles(group, self.head.reconstruct(group).to(group.target))
            for number, drawn in zip(group.numbers, tiles, strict=True):
                record = outputs.images[number].record
                title = f"image {record.index} of {record.sample_id}: original, teacher, model"
                sheets[number] = Picture(title, sheet([("original", outputs.picture(number)), *drawn]))
        return [sheets[number] for number in range(len(outputs.images))]

    def _tiles(self, group: Group, made_INC: Tensor) -> list[list[Tile]]:
        """What stands beside each original."""
        try:
            pairs = [group.outputs.teacher.decode(rows) for rows in (group.target, made_INC)]
        except ModelError:  # it has no decoder
            drawn = [components(*rows, group.grid) for rows in zip(group.target, made_INC, strict=True)]
            return [[("target, 3 components", seen), (f"model: {self.head.how}", shown)] for seen, shown in drawn]
        photographs = [[photograph(one) for one in pixels] for pixels in pairs]
        return [
            [("teacher's own", seen), (f"model: {self.head.how}", shown)]
            for seen, shown in zip(*photographs, strict=True)
        ]


class Ross(Reconstruction):
    """The paper's family: ROSS-D, ROSS-R-Pixel, ROSS-R-Latent, ROSS-R-Latent2Pixel, by the option `variant`."""

    Options = RossOptions

    def __init__(self, options: Any, context: ObjectiveContext) -> None:
        super().__init__(options, context)
        rows, width = self.teacher_spec.width, context.llm_width
        if options.variant == "denoise":
            self.head = DenoisingHead(options, rows, width, context.visual_grid)
        elif options.variant == TO_PIXELS:
            self.head = DecodingHead(options.head, rows, width)
        else:
            self.head = RegressionHead(options.head, options.measure, rows, width)

    def conditions(self, outputs: Outputs) -> Tensor:
        return outputs.states()

    def weights(self, outputs: Outputs) -> Tensor:
        weights = super().weights(outputs)
        if self.options.loss_on == "all":
            return weights
        chosen = weights * (outputs.edited.cpu() == (self.options.loss_on == "edited"))
        share = outputs.per_image_mean(weights) / outputs.per_image_mean(chosen).clamp_min(1e-9)
        return chosen * outputs.to_rows(share)

    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        records = super().encode_target(teacher, inputs)
        if self.options.variant != TO_PIXELS:
            return records
        if any("pixels" not in views for views in inputs.prepared):
            raise ModelError(f"variant {TO_PIXELS}: the teacher's prepare_image makes no `pixels` to compare with")
        return [{**made, "pixels": views["pixels"]} for made, views in zip(records, inputs.prepared, strict=True)]

    def teacher_fingerprint(self) -> str:
        """As of any objective with this teacher, so that they share it; but not where records hold pixels too."""
        shared = VisionObjective(self.options, self.context).teacher_fingerprint()
        return f"{shared}+pixels" if self.options.variant == TO_PIXELS else shared
