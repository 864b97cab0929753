"""ViCToR (arXiv 2410.14332): most visual tokens are replaced by rows of a learned pool, and reconstructed.

Shapes: R visual tokens of all images, S of them replaced, P rows of the pool, D width of the LLM.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from foveate import (
    AttentionWish,
    Edit,
    EditInputs,
    ImageRecord,
    LossTerm,
    Moment,
    ObjectiveContext,
    ObjectiveOptions,
    Outputs,
    Picture,
    Targets,
    VisionObjective,
)
from foveate.errors import TrainingError
from foveate_victor.head import HEADS
from foveate_victor.matching import Assignment, Cost, NotFinite, match, pairwise_costs
from foveate_victor.pool import Init, Pool, check_memory

_START_IMAGES = 256
"""Images that the rows of a pool are drawn from at the start."""


class VictorOptions(ObjectiveOptions):
    """Reconstruction of visual tokens that a learned pool has replaced (arXiv 2410.14332)."""

    pool_size: int = Field(2048, ge=1, description="Rows of the pool. With 1, all replaced tokens are one: a mask.")
    replace_fraction: float = Field(
        0.75, gt=0, le=1, description="Share of an image's N visual tokens that are replaced: N - ⌊N (1 - share)⌋."
    )
    assignment: Assignment = Field(
        "hungarian",
        description="`hungarian`: the least total cost where each replaced token of an image has a row of its own (no "
        "row more than ⌈tokens/rows⌉ times where there are too few). `nearest`: each token its nearest row.",
    )
    cost: Cost = Field("euclidean", description="Between a token and a row: `euclidean`, or `cosine` (1 - cosine).")
    pool_init: Init = Field(
        "features",
        description="`features`: visual tokens of the first stage's images. `unit_gaussian`: random directions. "
        "`gaussian`: N(0, 1), the released code's, √D times longer than normalised tokens where `pool_norm` is free.",
    )
    pool_norm: Literal["unit", "free"] = Field(
        "unit",
        description="`unit`: rows are directions, and get the norm of the tokens they replace. `free`: as long as they "
        "are, in costs and in the LLM's input (measured in norms of the replaced token where `target: normalised`).",
    )
    revive_unused: int | None = Field(
        None, ge=1, description="Steps without a match after which a row becomes a copy of a used one. Default: never."
    )
    target: Literal["normalised", "raw"] = Field(
        "normalised", description="What is matched and reconstructed: visual tokens at norm 1, or as they are."
    )
    loss_on: Literal["all", "replaced"] = Field("all", description="Visual tokens that the loss runs over.")
    beta: float = Field(0.01, gt=0, description="Error at which the smooth L1 loss turns from square to linear.")
    scale: float = Field(10.0, gt=0, description="Constant of the paper's code inside the loss; `weight` is on top.")
    head: Literal["linear", "transformer"] = Field(
        "linear", description="`transformer`: the first version's, a BERT layer over the tokens of an image."
    )
    attention: Literal["causal", "prefix_bidirectional"] = Field(
        "causal", description="`prefix_bidirectional`: the first version's, images and prompt see each other."
    )


@dataclass(frozen=True)
class Replaced:
    """What an edit did: `where` `[S]` the rows of the visual tokens, `rows` `[S]` of the pool, `costs` `[S]` between
    them, and `seconds` of the matching."""

    where: Tensor
    rows: Tensor
    costs: Tensor
    seconds: float


class Victor(VisionObjective):
    """Sum over visual tokens of scale · the mean over D of smoothL1_beta(head(state) - token).

    The tokens are the projector's, before any replacement and without gradient; the pool learns through the LLM's input
    alone. For a projector that does not normalise, `target: normalised` is of the loss only: the LLM reads tokens of
    the projector's own norms, so the model stays what it was.
    """

    Options = VictorOptions

    def __init__(self, options: Any, context: ObjectiveContext) -> None:
        """Raises `ModelError` where the pool does not fit into memory."""
        super().__init__(options, context)
        tokens, width = math.prod(context.visual_grid), context.llm_width
        check_memory(options.pool_size, width, replaced_of(tokens, options.replace_fraction), _memory())
        self.pool = Pool(options.pool_size, width, options.pool_init, options.pool_norm == "unit")
        self.head = HEADS[options.head](width, tokens)

    @classmethod
    def attention(cls, options: Any) -> AttentionWish:
        wish: AttentionWish = options.attention
        return wish

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        return replaced_of(record.tokens, options.replace_fraction) if options.loss_on == "replaced" else record.tokens

    def start_head(self, batches: Iterable[EditInputs]) -> None:
        """With `pool_init: features`: tokens of 256 images, as many of each; of fewer images again and again."""
        if self.options.pool_init != "features":
            return
        size, found = self.options.pool_size, list[Tensor]()
        share = math.ceil(size / _START_IMAGES)
        for number, inputs in enumerate(batches):
            for image, tokens_ND in enumerate(inputs.split(self._measured(inputs.tokens))):
                order = torch.randperm(len(tokens_ND), generator=inputs.generator(image, f"pool {number}"))
                found.append(tokens_ND[order[:share].to(tokens_ND.device)])
            if sum(map(len, found)) >= size:
                break
        self.pool.start(torch.cat(found)[:size])

    def edit_visual_tokens(self, inputs: EditInputs) -> Edit:
        """Raises `TrainingError` that names the sample whose visual tokens are not finite."""
        tokens_RD = inputs.tokens.detach()
        where_S, sizes = self._drawn(inputs)
        found = self._matched(inputs, tokens_RD.index_select(0, where_S), sizes)
        chosen_SD = self.pool.rows.index_select(0, found.rows)
        keep_norm = self.options.pool_norm == "unit"
        if not keep_norm and self.options.target == "normalised":
            chosen_SD = chosen_SD * tokens_RD.index_select(0, where_S).norm(dim=-1, keepdim=True)
        edited_R = torch.zeros(len(tokens_RD), dtype=torch.bool, device=tokens_RD.device).index_fill(0, where_S, True)
        made_RD = tokens_RD.index_copy(0, where_S, chosen_SD.to(tokens_RD.dtype))
        state = Replaced(where_S, found.rows, found.costs, found.seconds)
        return Edit(made_RD, edited_R, state, keep_norm=keep_norm)

    def loss(self, outputs: Outputs, targets: Targets, state: Replaced) -> LossTerm:
        options, wanted_RD = self.options, self._measured(outputs.visual_tokens.detach())
        made_RD = self.head(outputs.states())
        errors_R = F.smooth_l1_loss(made_RD, wanted_RD, reduction="none", beta=options.beta).mean(-1)
        taken_R = errors_R.index_select(0, state.where) if options.loss_on == "replaced" else errors_R
        uses_P = torch.bincount(state.rows, minlength=options.pool_size)
        metrics = self._metrics(outputs, made_RD.detach(), wanted_RD, state)
        return LossTerm(options.scale * taken_R.sum(), metrics, {"uses": uses_P})

    def after_step(self, step: int, statistics: Mapping[str, Tensor]) -> None:
        self.pool.count(statistics["uses"])
        if self.options.revive_unused is not None and self.pool.rows.requires_grad:
            seed = Moment(self.context.seed, "", step).seed_of(self.context.name, "revive")
            self.pool.revive(self.options.revive_unused, statistics["uses"], torch.Generator().manual_seed(seed))

    def visualize(self, outputs: Outputs, targets: Targets, state: Replaced) -> list[Picture]:
        """Regions of neighbouring patches with one nearest row, as in the paper's figure 4, and the pool's use."""
        from foveate_victor.pictures import contact_sheet, usage  # matplotlib, only when something is drawn

        tokens_RD = outputs.visual_tokens
        costs_RP = self._costs(tokens_RD)
        nearest = match(costs_RP, [len(tokens_RD)], "nearest").rows
        maps = [
            rows_N.reshape(image.record.grid).cpu().numpy()
            for image, rows_N in zip(outputs.images, outputs.split(nearest), strict=True)
        ]
        images = [outputs.picture(number) for number in range(len(maps))]
        return [*contact_sheet(images, maps), *usage(self.pool.uses.cpu().numpy())]

    def _measured(self, tokens_RD: Tensor) -> Tensor:
        """Tokens as they are matched and reconstructed."""
        return F.normalize(tokens_RD, dim=-1) if self.options.target == "normalised" else tokens_RD

    def _drawn(self, inputs: EditInputs) -> tuple[Tensor, list[int]]:
        """`[S]`: the tokens that are replaced, in order, drawn for each image by itself; how many of each image."""
        parts = []
        for number, image in enumerate(inputs.images):
            size = image.rows.stop - image.rows.start
            order = torch.randperm(size, generator=inputs.generator(number, "replaced"))
            chosen = order[: replaced_of(size, self.options.replace_fraction)].sort().values
            parts.append(image.rows.start + chosen)
        return torch.cat(parts).to(inputs.tokens.device, non_blocking=True), [len(part) for part in parts]

    def _matched(self, inputs: EditInputs, tokens_SD: Tensor, sizes: list[int]) -> Any:
        try:
            return match(self._costs(tokens_SD), sizes, self.options.assignment)
        except NotFinite as error:
            image = inputs.images[error.args[0]].record
            row = sum(sizes[: error.args[0]])
            bad = int((~tokens_SD[row : row + sizes[error.args[0]]].isfinite()).any(-1).sum())
            what = f"{bad} of its visual tokens are" if bad else "the pool, or the size of its visual tokens, is"
            raise TrainingError(
                f"objective '{self.context.name}': image {image.index} of sample '{image.sample_id}' cannot be matched "
                f"with the pool: {what} not finite. Look at the picture (`foveate data check`), or lower the rates of "
                "encoder and projector."
            ) from None

    @torch.no_grad()
    def _costs(self, tokens_SD: Tensor) -> Tensor:
        """`[S, P]`: between what stands there and what would be inserted, in the units of the target."""
        options = self.options
        pool_PD = self.pool.candidates().to(tokens_SD.dtype)
        if options.pool_norm == "free":
            return pairwise_costs(self._measured(tokens_SD), pool_PD, options.cost)
        costs_SP = pairwise_costs(F.normalize(tokens_SD, dim=-1), pool_PD, options.cost)
        if options.target == "raw" and options.cost == "euclidean":
            costs_SP *= tokens_SD.norm(dim=-1, keepdim=True)  # a row gets the norm of the token that it replaces
        return costs_SP

    @torch.no_grad()
    def _metrics(
        self, outputs: Outputs, made_RD: Tensor, wanted_RD: Tensor, state: Replaced
    ) -> dict[str, tuple[Tensor | float, float]]:
        images, all_rows, replaced = len(outputs.images), len(wanted_RD), len(state.where)
        cosines_R = F.cosine_similarity(made_RD, wanted_RD, dim=-1)
        on_replaced = cosines_R.index_select(0, state.where).sum()
        means_ID = outputs.per_image_mean(wanted_RD)
        squares_I = outputs.per_image_mean(wanted_RD.square().sum(-1)).clamp_min(1e-12)
        used = self.pool.used()
        return {
            "cosine_kept": (cosines_R.sum() - on_replaced, all_rows - replaced),
            "cosine_replaced": (on_replaced, replaced),
            "target_variance": ((1 - means_ID.square().sum(-1) / squares_I).sum(), images),
            "used_rows": (0.0, 0.0) if used is None else (images * used, images),
            "matching_cost": (state.costs.sum(), replaced),
            "matching_seconds": (state.seconds, images),
        }


def replaced_of(tokens: int, fraction: float) -> int:
    """How many of an image's tokens are replaced: all but ⌊tokens · (1 - fraction)⌋, of the fraction as written."""
    return tokens - math.floor(tokens * (1 - Fraction(str(fraction))))


def _memory() -> int:
    """Bytes of memory of the accelerator, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
