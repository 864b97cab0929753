"""Pictures: the exported processor's pixels bit for bit, and one clear error for each way a file can be broken."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from foveate.data import images
from foveate.data.dataset import SampleError
from foveate.data.images import content_box, make_image_processor, open_image, to_pixels
from foveate.errors import ModelError
from foveate.types import EncoderSpec, Geometry, ImageRef

GEOMETRIES = get_args(Geometry)
PROCESSORS = ["CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor"]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor_that_an_export_loads(
    name: str, geometry: Geometry, encoder: EncoderSpec, photographs: list[Image.Image], digits: list[Image.Image],
    tmp_path: Path,
) -> None:  # fmt: skip
    spec = replace(encoder, image_processor=name)
    make_image_processor(spec, geometry).save_pretrained(tmp_path)
    exported = AutoImageProcessor.from_pretrained(tmp_path)
    pictures = [*photographs, photographs[0].resize((48, 48)), photographs[1].resize((20, 31)), *digits]
    for picture in pictures:
        expected = exported(picture, return_tensors="pt")["pixel_values"][0]
        assert expected.shape == (3, 48, 48)
        assert torch.equal(to_pixels(picture, spec, geometry), expected)


def test_resized_pixels_agree_with_pillow_to_a_grey_level(encoder: EncoderSpec, photographs: list[Image.Image]) -> None:
    """An independent computation: Pillow's own filter, then (x / 255 - mean) / std."""
    expected = np.asarray(photographs[0].resize((48, 48), Image.Resampling.BICUBIC)) / 255
    expected = (expected - encoder.mean) / encoder.std
    pixels = to_pixels(photographs[0], encoder, "resize").permute(1, 2, 0).numpy()
    assert np.abs((pixels - expected) * encoder.std * 255).max() < 1.01


def test_padding_has_the_mean_colour_outside_the_content_box(encoder: EncoderSpec) -> None:
    white = Image.new("RGB", (96, 48), "white")
    pixels = to_pixels(white, encoder, "pad")
    box = content_box(white.size, "pad")
    assert box == (0.0, 0.25, 1.0, 0.75)
    assert content_box(white.size, "resize") == content_box(white.size, "crop") == (0.0, 0.0, 1.0, 1.0)
    rows = [round(edge * 48) for edge in (box[1], box[3])]
    assert pixels[:, : rows[0] - 2].abs().max() < 0.02 and pixels[:, rows[1] + 2 :].abs().max() < 0.02
    assert pixels[:, rows[0] + 2 : rows[1] - 2].min() > 1.5


def test_crop_keeps_the_middle(encoder: EncoderSpec) -> None:
    array = np.zeros((48, 144, 3), np.uint8)
    array[:, 48:96] = 255
    assert (to_pixels(Image.fromarray(array), encoder, "crop") > 1.5).all()


def test_a_processor_that_transformers_lacks_is_an_error(encoder: EncoderSpec) -> None:
    with pytest.raises(ModelError, match="'NoSuchProcessor'"):
        make_image_processor(replace(encoder, image_processor="NoSuchProcessor"), "resize")


def _open(source: object) -> Image.Image:
    return open_image(ImageRef(source), "sample 's'")  # type: ignore[arg-type]


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path, digits: list[Image.Image]) -> None:
    digits[0].save(tmp_path / "d.png")
    sources = [tmp_path / "d.png", (tmp_path / "d.png").read_bytes(), digits[0], lambda: digits[0]]
    for source in sources:
        assert _open(source).tobytes() == digits[0].tobytes()


def test_exif_orientation_is_applied(tmp_path: Path, photographs: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    photographs[0].save(tmp_path / "turned.png", exif=exif)
    assert _open(tmp_path / "turned.png").tobytes() == photographs[0].rotate(-90, expand=True).tobytes()


def test_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert _open(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert _open(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert _open(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    assert _open(Image.new("CMYK", (4, 4), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


def test_broken_files_are_sample_errors_with_the_path(
    tmp_path: Path, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs[0].save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, why in {"missing.jpg": "does not exist", "truncated.jpg": "truncated", "text.jpg": "cannot identify",
                      "empty.png": "cannot identify"}.items():  # fmt: skip
        with pytest.raises(SampleError, match=why) as caught:
            _open(tmp_path / name)
        assert caught.value.kind == "image" and str(tmp_path / name) in str(caught.value)
        assert str(caught.value).startswith("sample 's': ")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(SampleError, match="640 x 427 pixels are more than the limit of 1000"):
        _open(tmp_path / "whole.jpg")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    with pytest.raises(SampleError, match=r"DecompressionBomb|more than the limit"):
        _open(huge.getvalue())


def test_a_picture_that_cannot_be_made_names_the_reason() -> None:
    def make() -> Image.Image:
        raise KeyError("scan 7")

    with pytest.raises(SampleError, match="scan 7"):
        _open(make)
