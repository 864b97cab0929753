"""What ASVR has learned, for people: maps of codes, patches that share a code, and codes of appearance as pictures."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate import Outputs, Picture, Targets
from foveate_asvr.appearance import AppearanceTokenizer, psnr
from foveate_asvr.quantizer import ResidualQuantizer

ROWS, PATCHES, PATCH_PX = 8, 8, 48
"""Codes and patches of a contact sheet, and the side of a patch."""

SHARED = 3
"""Patches that a code of a contact sheet has at least, where enough codes have as many."""

NOTHING = -1
"""In a map: the first visual token of an image that opens its sample, whose codes nothing predicts with `shift: 1`."""


def draw(objective: Any, outputs: Outputs, targets: Targets) -> list[Picture]:
    """Pictures of every target of the objective; its own words are in `Asvr.visualize`."""
    pictures, states = list[Picture](), outputs.states()
    for name, head in objective.heads.items():
        tokenizer = outputs.teacher[name]
        appearance = isinstance(tokenizer, AppearanceTokenizer)
        codes = [record[name] for record in targets]
        predicted = outputs.split(predict(head, states, targets.rows(name), tokenizer.quantizer, whole=appearance))
        for at, image in enumerate(outputs.images):
            first = torch.cat([predicted[at].new_full((image.dropped,), NOTHING), predicted[at][:, 0]])
            right = (predicted[at][:, 0] == codes[at][image.dropped :, 0]).double().mean()
            maps = [code_map(each, image.record.grid) for each in (codes[at][:, 0], first)]
            where = f"image {image.record.index} of {image.record.sample_id}"
            told = f"{where}: {name} codes of depth 1; those predicted, {100 * float(right):.0f} % right"
            pictures.append(Picture(told, beside(outputs.picture(at), *maps)))
            if appearance:
                whole = torch.cat([codes[at][: image.dropped], predicted[at]])
                pictures.append(_decoded(tokenizer, outputs.picture(at), codes[at], whole, where))
        sheet = contact_sheet([outputs.picture(at) for at in range(len(codes))], codes, outputs)
        pictures.append(Picture(f"patches that share a {name} code of depth 1, a row a code", sheet))
    return pictures


@torch.no_grad()
def predict(head: Any, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer, whole: bool) -> Tensor:
    """The likeliest codes of states `[R, D]`: of depth 1, `[R, 1]`, or of all depths one after the other, `[R, Q]`."""
    if whole:
        return head.greedy(states, quantizer)
    return next(head.each_depth(states, codes, quantizer)).argmax(1, keepdim=True)


def colour(code: int) -> tuple[int, int, int]:
    """The colour of a code, the same in every picture; neighbours in number are far apart in hue."""
    if code == NOTHING:
        return 128, 128, 128
    hue, light = code * 0.6180339887 % 1, 0.35 + 0.4 * (code * 0.7548776662 % 1)
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def code_map(codes: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Codes `[h*w]` as a picture of w by h pixels."""
    colours = np.array([colour(int(code)) for code in codes.tolist()], dtype=np.uint8)
    return Image.fromarray(colours.reshape(*grid, 3))


def beside(first: Image.Image, *others: Image.Image) -> Image.Image:
    """Pictures side by side, all as large as the first, in squares rather than smoothed."""
    sheet = Image.new("RGB", (first.width * (1 + len(others)), first.height))
    for number, picture in enumerate((first, *others)):
        sheet.paste(picture.resize(first.size, Image.Resampling.NEAREST), (number * first.width, 0))
    return sheet


def contact_sheet(pictures: list[Image.Image], codes: list[Tensor], outputs: Outputs) -> Image.Image:
    """Codes of depth 1, a row each: the code's colour, and patches that have it, of most images.

    Those whose patches have most contrast: the most frequent ones are of background.
    """
    places = dict[int, list[tuple[int, int]]]()
    for at, each in enumerate(codes):
        for token, code in enumerate(each[:, 0].tolist()):
            places.setdefault(code, []).append((at, token))
    patches = {
        code: [_patch(pictures[at], token, outputs.images[at].record.grid) for at, token in _spread(found)]
        for code, found in places.items()
    }
    contrast = {code: np.mean([np.asarray(patch).std() for patch in found]) for code, found in patches.items()}
    chosen = sorted(places, key=lambda code: (-min(len(places[code]), SHARED), -contrast[code], code))[:ROWS]
    sheet = Image.new("RGB", ((1 + PATCHES) * PATCH_PX, len(chosen) * PATCH_PX))
    for row, code in enumerate(chosen):
        sheet.paste(Image.new("RGB", (PATCH_PX, PATCH_PX), colour(code)), (0, row * PATCH_PX))
        for column, patch in enumerate(patches[code], 1):
            sheet.paste(patch, (column * PATCH_PX, row * PATCH_PX))
    return sheet


def _spread(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """As many of the places as a row shows, evenly spread."""
    return places[:: max(1, len(places) // PATCHES)][:PATCHES]


def _patch(picture: Image.Image, token: int, grid: tuple[int, int]) -> Image.Image:
    """The part of a picture under a visual token."""
    (rows, columns), (row, column) = grid, divmod(token, grid[1])
    width, height = picture.width / columns, picture.height / rows
    box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    return picture.resize((PATCH_PX, PATCH_PX), Image.Resampling.BICUBIC, box=box)


def _decoded(tokenizer: Any, seen: Image.Image, wanted: Tensor, predicted: Tensor, where: str) -> Picture:
    """A picture, what the decoder makes of its codes `[N, Q]`, and of those predicted; titled by the former's PSNR."""
    made = [_image(pixels) for pixels in tokenizer.decode(torch.stack([wanted, predicted]))]
    resized = seen.resize(made[0].size, Image.Resampling.BICUBIC)
    error = np.square((np.asarray(resized, dtype=np.float64) - np.asarray(made[0], dtype=np.float64)) / 255).mean()
    title = f"{where}: decoded from its appearance codes, {psnr(float(error)):.1f} dB; from those predicted"
    return Picture(title, beside(seen, *made))


def _image(pixels: Tensor) -> Image.Image:
    """`[3, H, W]` in 0…1 as a picture."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
