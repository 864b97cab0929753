"""Cosine alignment of a middle LLM layer with the encoder:  loss = sum over visual tokens of 1 - cos(W h, e)."""

from typing import Any

import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from foveate import LossTerm, ObjectiveContext, ObjectiveOptions, Outputs, Picture, Reads, Targets, VisionObjective


class AlignLoss(VisionObjective):
    """Keeps the encoder's features readable from the LLM's visual states, through a linear head."""

    class Options(ObjectiveOptions):  # brings `weight` and the schedule; more fields are more keys in a recipe
        layer: int | float = Field(0.5, description="LLM layer: 0.5 is half the depth, 3 after block 3, -1 the end.")

    def __init__(self, options: Any, context: ObjectiveContext) -> None:
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, context.encoder.width)  # what is a sub-module is trained and saved

    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(llm=(options.layer,), encoder=(-1,))  # only what stands here can be asked for in `loss`

    def cosines(self, outputs: Outputs) -> Tensor:
        """`[R]`: one for each visual token of the images, image after image."""
        features = outputs.encoder_states(-1)  # no gradient; on the encoder's grid, the visual tokens' may be coarser
        features = outputs.on_visual_grid(features, outputs.encoder_grid)
        return F.cosine_similarity(self.head(outputs.states(self.options.layer)), features, dim=-1)

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        cosines = self.cosines(outputs)  # a sum, no mean: foveate divides by the visual tokens of the whole step
        return LossTerm((1 - cosines).sum(), {"cosine": (cosines.sum(), len(cosines))})

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        """A map of each image: white where the LLM still holds what the encoder saw, black where it does not."""
        pictures = []
        for image, cosines in zip(outputs.images, outputs.split(self.cosines(outputs)), strict=True):
            rows, columns = image.record.grid
            cells = (cosines.clamp(0, 1) * 255).byte().reshape(rows, columns).cpu().numpy()
            shown = Image.fromarray(cells).resize((16 * columns, 16 * rows), Image.Resampling.NEAREST)
            pictures.append(Picture(f"{image.record.sample_id}: mean cosine {float(cosines.mean()):.2f}", shown))
        return pictures
