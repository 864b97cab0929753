"""The contact sheet of codes: which ones are shown, and that each row shows patches that have its code."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from foveate import ImageRecord, Outputs
from foveate_asvr.pictures import PATCH_PX, PATCHES, colour, contact_sheet


def test_codes_with_most_contrast_come_first_if_enough_patches_share_them() -> None:
    """Code 0: flat and most frequent; 1: a weak edge; 2: a strong edge, but two patches only."""
    codes_N = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [0] * 2)
    pixels = np.zeros((4, 4, 8, 8), dtype=np.uint8)  # a 4 x 4 grid of patches of 8 x 8 pixels
    for code, edge in ((1, 60), (2, 250)):
        pixels.reshape(16, 8, 8)[codes_N.numpy() == code, :, 4:] = edge
    picture = Image.fromarray(pixels.transpose(0, 2, 1, 3).reshape(32, 32)).convert("RGB")
    records = [ImageRecord("sample", 0, "input", (4, 4), 0)]
    outputs = Outputs.of(records, {-1: torch.zeros(16, 3)})
    sheet = np.asarray(contact_sheet([picture], [codes_N[:, None]], outputs))
    assert sheet.shape == (3 * PATCH_PX, (1 + PATCHES) * PATCH_PX, 3)
    rows = [tuple(sheet[row * PATCH_PX, 0].tolist()) for row in range(3)]
    assert rows == [colour(1), colour(0), colour(2)]
    right_edges = sheet[PATCH_PX // 2 :: PATCH_PX, 2 * PATCH_PX - 2 :: PATCH_PX, 0]
    assert (right_edges > 20).tolist() == [[at < shown for at in range(8)] for shown in (4, 0, 2)]
