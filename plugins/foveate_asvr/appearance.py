"""The teacher `appearance_tokenizer`: residual codes of an early layer, learned together with a decoder to pixels.

As the appearance half of ASVR's tokenizer: a residual block of convolutions on the features of an early layer, a
residual quantiser, a decoder; trained on the squared error of pixels and the commitment of the block to the codes (mean
over depths of the squared distance to the partial sums). The perceptual and adversarial losses of the paper's tokenizer
need further networks and are not there.

Shapes: I images, (h, w) grid of visual tokens, N = h*w, C width of the features, Q depths, P side of a token's pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from foveate import ImageRecord, Layer, TeacherInputs
from foveate.options import Options
from foveate.teachers.patches import PatchOptions, PatchTeacher, to_maps, unit
from foveate_asvr.clustering import SETTLE, Codebooks, FitOptions, measure
from foveate_asvr.folder import Card
from foveate_asvr.quantizer import FullPrecision
from foveate_asvr.tokenizer import Tokenizer, TokenizerOptions


class AppearanceFit(FitOptions):
    """How block, codebooks and decoder are learned from the pictures of the stage."""

    batch_images: int = Field(32, gt=0, description="Pictures of a step.")
    lr: float = Field(1e-3, gt=0, description="Learning rate of block and decoder; a cosine lets it fall to zero.")
    plain: float = Field(0.2, ge=0, lt=1, description="Share of the pictures before the quantiser is put in between.")
    commitment: float = Field(0.25, ge=0, description="Weight of the commitment beside the error of pixels.")


class DecoderOptions(Options):
    """From quantised rows to pixels: convolutions on the grid of visual tokens."""

    width: int = Field(512, gt=0, description="Channels.")
    blocks: int = Field(3, ge=0, description="Residual blocks of two convolutions.")
    patch_px: int = Field(16, gt=0, description="Side of a visual token's pixels.")


class AppearanceOptions(TokenizerOptions):
    """Residual codes of an early layer that a decoder turns into pixels."""

    layer: Layer | None = Field(
        0.22, description="Features after block k, or at a share of the depth: 0.22 is block 6 of 27, as in the paper. "
        "With an `encoder` of its own: a whole number, or null for the layer among its options."
    )  # fmt: skip
    decoder: DecoderOptions = Field(DecoderOptions(), description="From codes to pixels.")
    fit: AppearanceFit = Field(AppearanceFit(), description="How it is learned.")


class Block(FullPrecision):
    """x + conv(GELU(conv(norm(x)))) on maps `[I, W, h, w]`."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.second(F.gelu(self.first(self.norm(maps))))


class Decoder(FullPrecision):
    """Maps of quantised rows `[I, C, h, w]` → pixels `[I, 3*P*P, h, w]`."""

    def __init__(self, width: int, options: DecoderOptions):
        super().__init__()
        blocks = [Block(options.width) for _ in range(options.blocks)]
        first = nn.Conv2d(width, options.width, 3, padding=1)
        last = nn.Conv2d(options.width, 3 * options.patch_px**2, 1)
        self.layers = nn.Sequential(first, *blocks, nn.GELU(), last)

    def forward(self, maps: Tensor) -> Tensor:
        pixels: Tensor = self.layers(maps)
        return pixels


class AppearanceTokenizer(Tokenizer):
    """Records `codes` `[N, Q]` int64 of an early layer; `decode` makes pictures of codes."""

    Options = AppearanceOptions
    kind = "appearance"

    @classmethod
    def prepare_image(cls, options: AppearanceOptions, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """`pixels` of an encoder of its own, and `wanted`, what the decoder learns, where it is to be fitted."""
        views = super().prepare_image(options, image, record)
        if options.pretrained is None:
            patch = PatchOptions(patch_px=options.decoder.patch_px)
            views["wanted"] = PatchTeacher.prepare_image(patch, image, record)["pixels"]
        return views

    def _build(self, card: Card | None) -> None:
        decoder: DecoderOptions = self.options.decoder
        self.decoding = decoder if card is None else DecoderOptions.model_validate(dict(card.options["decoder"]))
        self.block = Block(self.quantizer.width)
        self.decoder = Decoder(self.quantizer.width, self.decoding)

    def _more(self) -> dict[str, Any]:
        return {"decoder": self.decoding.model_dump(mode="json")}

    def rows(self, inputs: TeacherInputs) -> list[Tensor]:
        features = super().rows(inputs)
        with torch.autocast(features[0].device.type, enabled=False), torch.no_grad():
            return [self.latents(rows[None])[0] for rows in features]

    def latents(self, features: Tensor) -> Tensor:
        """Features `[I, N, C]` → what is quantised, `[I, N, C]`."""
        maps = features.transpose(1, 2).unflatten(2, self.context.visual_grid)
        return self.block(maps.to(self.block.first.weight.dtype)).flatten(2).transpose(1, 2)

    def pixels(self, rows: Tensor) -> Tensor:
        """Quantised rows `[I, N, C]` → pixels around -1…1, `[I, N, 3*P*P]`."""
        maps = rows.transpose(1, 2).unflatten(2, self.context.visual_grid)
        return self.decoder(maps.to(self.block.first.weight.dtype)).flatten(2).transpose(1, 2)

    def decode(self, target: Tensor) -> Tensor:
        """Codes `[I, N, Q]` → pictures in 0…1, `[I, 3, h*P, w*P]`."""
        rows = self.quantizer.decode(target.flatten(0, 1)).unflatten(0, target.shape[:2])
        return unit(to_maps(self.pixels(rows), self.context.visual_grid, self.decoding.patch_px))

    def fit(self, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        options: AppearanceFit = self.options.fit
        pairs, random = self._pairs(batches), torch.Generator().manual_seed(self.seed)
        books = Codebooks(self.quantizer, options, self.seed)
        steps = max(2, options.images // options.batch_images)
        plain = min(round(options.plain * steps), steps - 1)
        learned = [*self.block.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=0.0)
        for step in range(steps):
            if step == plain:
                books.start(self._first_rows(pairs, random))
            features, wanted = self._batch(pairs, options.batch_images)
            with torch.enable_grad():
                latents = self.latents(features)
                error = self._error(latents, wanted, quantized=step >= plain)
            optimizer.param_groups[0]["lr"] = options.lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            optimizer.step()
            if step >= plain:
                books.update(latents.detach().flatten(0, 1), revive=step < (1 - SETTLE) * steps)
        optimizer.zero_grad(set_to_none=True)
        return self._told(pairs)

    def _error(self, latents: Tensor, wanted: Tensor, quantized: bool) -> Tensor:
        """Squared error of pixels, and commitment, of latents `[I, N, C]` and pixels `[I, N, 3*P*P]`."""
        if not quantized:
            return F.mse_loss(self.pixels(latents), wanted)
        rows = latents.flatten(0, 1)
        with torch.no_grad():
            left = self.quantizer.residuals(rows)[1]
        straight = rows - left[-1]  # its values are the quantised rows, its gradient that of the rows
        commitment = torch.stack([(rows - (rows.detach() - rest)).square().mean() for rest in left]).mean()
        error = F.mse_loss(self.pixels(straight.unflatten(0, latents.shape[:2])), wanted)
        return error + self.options.fit.commitment * commitment

    def _pairs(self, batches: Iterable[TeacherInputs]) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `[N, C]` and wanted pixels `[N, 3*P*P]` of one picture after the other."""
        teacher = PatchTeacher(PatchOptions(patch_px=self.decoding.patch_px), self.context)
        for inputs in batches:
            wanted = teacher.encode(inputs.with_prepared([{"pixels": views["wanted"]} for views in inputs.prepared]))
            for rows, record in zip(super().rows(inputs), wanted, strict=True):
                yield rows, record["patches"].to(rows.dtype)

    @staticmethod
    def _batch(pairs: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
        features, wanted = zip(*itertools.islice(pairs, count), strict=True)
        return torch.stack(features), torch.stack(wanted)

    @torch.no_grad()
    def _first_rows(self, pairs: Iterator[tuple[Tensor, Tensor]], random: torch.Generator) -> Tensor:
        """Rows to start the codebooks from, at most `spread` of a picture unless the pictures are too few for that."""
        options, wanted = self.options.fit, self.options.fit.reservoir * self.quantizer.size
        spread = max(options.spread, math.ceil(wanted / options.images))
        found, number = list[Tensor](), 0
        while number < wanted and len(found) < options.images:
            rows = self.latents(next(pairs)[0][None])[0]
            order = torch.randperm(len(rows), generator=random)[:spread].sort().values
            found.append(rows[order.to(rows.device)])
            number += len(found[-1])
        return torch.cat(found)

    @torch.no_grad()
    def _told(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """What `measure` tells of the codes, and `psnr` of decoded pictures, in dB, on pictures that come next."""
        rows, errors = list[Tensor](), list[Tensor]()
        for features, wanted in itertools.islice(pairs, self.options.fit.check):
            latents = self.latents(features[None])
            rows.append(latents[0])
            made = unit(self.pixels(self.quantizer.decode(self.quantizer.encode(rows[-1]))[None]))
            errors.append((made[0] - (wanted + 1) / 2).square().mean())
        return {"psnr": psnr(torch.stack(errors).mean()), **measure(self.quantizer, torch.cat(rows))}


def psnr(error: Tensor | float) -> float:
    """Of a mean squared error of pixels in 0…1, in dB."""
    return -10 * math.log10(max(float(error), 1e-10))

