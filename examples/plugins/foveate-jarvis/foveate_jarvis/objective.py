"""JARVIS (arXiv 2512.15885): in an early LLM layer, hidden visual tokens predict what a frozen teacher sees there.

Shapes: R visual tokens of I images, D width of the LLM, F of the teacher's features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

import foveate
from foveate_jarvis.blocks import CONTEXT, REST, TARGETS, draw_groups, shapes


class Jarvis(foveate.VisionObjective):
    """Sum over images of the mean of 1 - cos(head(state), feature) over the tokens of the image's target blocks."""

    class Options(foveate.ObjectiveOptions):
        """Options of `jarvis`."""

        probability: float = Field(0.8, gt=0, le=1, description="Share of steps that it takes part in.")
        layer: foveate.Layer = Field(0.25, description="LLM layer that it reads: 0.25 at a quarter, 3 after block 3.")
        teacher: foveate.TeacherChoice = Field(description="Frozen teacher of `features`, a row for a visual token.")

    def __init__(self, options: Any, context: foveate.ObjectiveContext) -> None:
        """Raises `FoveateError` where the layer or the grid leaves nothing to predict from."""
        super().__init__(options, context)
        if 0 <= options.layer < 1 and round(options.layer * context.llm_layers) == 0:
            problem = f"layer: {options.layer} of {context.llm_layers} layers is the input, where no token saw another"
            raise foveate.FoveateError(f"objectives.{context.name}.{problem}")
        grid, width = context.visual_grid, context.llm_width
        largest, smallest = max(h * w for h, w in shapes(grid, True)), min(h * w for h, w in shapes(grid, False))
        if len(TARGETS) * largest >= smallest:
            raise foveate.FoveateError(f"objectives.{context.name}: targets can hide all of {grid} visual tokens")
        self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.teacher_spec.width))

    @classmethod
    def reads(cls, options: Any) -> foveate.Reads:
        return foveate.Reads(llm=(options.layer,))

    @classmethod
    def attention(cls, options: Any) -> foveate.AttentionWish:
        return "groups"

    @classmethod
    def count(cls, options: Any, record: foveate.ImageRecord) -> float:
        return 1.0  # an image: how many tokens its targets have is drawn later

    def edit_visual_tokens(self, inputs: foveate.EditInputs) -> foveate.Edit:
        drawn = [draw_groups(each.record.grid, inputs.generator(i, "blocks")) for i, each in enumerate(inputs.images)]
        groups_R = torch.cat(drawn).to(inputs.tokens.device)
        hidden_R = (groups_R != CONTEXT) & (groups_R != REST)
        return foveate.Edit(self.mask.expand_as(inputs.tokens), hidden_R, state=hidden_R, groups=groups_R)

    def cosines(self, outputs: foveate.Outputs, targets: foveate.Targets) -> Tensor:
        """`[R]`, at every visual token, hidden or not."""
        predicted_RF = self.head(outputs.states(self.options.layer))
        return F.cosine_similarity(predicted_RF, targets.rows(), dim=-1)

    def loss(self, outputs: foveate.Outputs, targets: foveate.Targets, state: Any) -> foveate.LossTerm:
        cosines_R = self.cosines(outputs, targets)
        means_I = outputs.per_image_mean(cosines_R * state) / outputs.per_image_mean(state.to(cosines_R.dtype))
        return foveate.LossTerm((1 - means_I).sum(), {"cosine": (means_I.detach().sum(), len(means_I))})

    def visualize(self, outputs: foveate.Outputs, targets: foveate.Targets, state: Any) -> list[foveate.Picture]:
        """Each picture with its target blocks in grey, and the cosines in them, from black (-1) to white (1)."""
        cosines, hidden, pictures = outputs.split(self.cosines(outputs, targets)), outputs.split(state), []
        for number, (image, cosines_N, hidden_N) in enumerate(zip(outputs.images, cosines, hidden, strict=True)):
            shown = outputs.picture(number)
            mask = _picture(hidden_N.reshape(image.record.grid), shown.size)
            sheet = Image.new("RGB", (2 * shown.width, shown.height))
            sheet.paste(Image.composite(Image.new("RGB", shown.size, "grey"), shown, mask))
            sheet.paste(_picture((cosines_N.reshape(image.record.grid) + 1) / 2, shown.size), (shown.width, 0), mask)
            title = f"image {image.record.index} of {image.record.sample_id}: hidden; cosines there, black -1, white 1"
            pictures.append(foveate.Picture(title, sheet))
        return pictures


def _picture(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """Values in 0…1, `[h, w]`, as a picture, drawn up to `size` (width, height) in squares."""
    picture = Image.fromarray((values.float().clamp(0, 1) * 255).byte().cpu().numpy())
    return picture.resize(size, Image.Resampling.NEAREST)
