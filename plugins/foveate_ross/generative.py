"""The generative counterpart of ROSS (table 2 and figure 11 of arXiv 2410.09575): a target that the model does not see.

A sample holds a prompt and an image of role `target`. Learned query tokens end the sample, and their states condition
the denoiser in the place of the states of visual tokens. The paper has 576 of them, as many as visual tokens.

Shapes: I images, N target rows of one, Q query tokens of one, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ImageRecord, ImageRows, ObjectiveContext, Outputs, resize_rows
from foveate_ross.heads import DenoisingHead
from foveate_ross.objective import Reconstruction
from foveate_ross.options import GenerativeOptions


class RossGenerative(Reconstruction):
    """The loss of ROSS-D on target images, conditioned on the states of learned query tokens."""

    Options = GenerativeOptions
    role = "target"

    def __init__(self, options: Any, context: ObjectiveContext) -> None:
        super().__init__(options, context)
        self.query_grid = options.query_grid or context.visual_grid
        self.queries = nn.Parameter(0.02 * torch.randn(self.query_grid[0] * self.query_grid[1], context.llm_width))
        self.head = DenoisingHead(options, self.teacher_spec.width, context.llm_width, context.visual_grid)

    @classmethod
    def extra_tokens(cls, options: Any, record: ImageRecord) -> int:
        rows, columns = options.query_grid or record.grid
        return int(rows * columns)

    def embed_extra_tokens(self, images: Sequence[ImageRows]) -> Tensor:
        return self.queries.repeat(len(images), 1)

    def conditions(self, outputs: Outputs) -> Tensor:
        parts = outputs.extra_states().split(len(self.queries))
        grids = [image.record.grid for image in outputs.images]
        return torch.cat([resize_rows(part, self.query_grid, grid) for part, grid in zip(parts, grids, strict=True)])
