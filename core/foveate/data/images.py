"""Pictures: opening them safely, and making the encoder's pixels with the processor that an export contains.

The back end is torchvision's, which transformers prefers: when resizing, the PIL back end differs by a grey level, so
training and a loaded export must use the same one.
"""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import convert_to_rgb

from foveate.data.dataset import SampleError
from foveate.errors import ModelError
from foveate.types import EncoderSpec, Geometry, ImageRef

MAX_PIXELS = 100_000_000  # with more a picture is refused before it is decoded: a bomb, or a scan to shrink first
MAX_SIDE, MAX_RATIO = 20_000, 200  # beyond, the padded square, or what is cut to one, is such a bomb


@lru_cache(maxsize=16)
def make_image_processor(spec: EncoderSpec, geometry: Geometry) -> Any:
    """The transformers image processor for `spec` and `geometry`, made once: an export saves this very one.

    `pad` is always a `LlavaImageProcessor` (padded to a square with the encoder's mean colour, then resized); `resize`
    and `crop` are the class that the encoder names. Raises `ModelError` for one without a torchvision back end.
    """
    name = "LlavaImageProcessor" if geometry == "pad" else spec.image_processor
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, TorchvisionBackend)):
        raise ModelError(f"the encoder's image processor '{name}' is none of transformers' torchvision processors")
    square = {"height": spec.image_size, "width": spec.image_size}
    size = {"shortest_edge": spec.image_size} if geometry == "crop" else square
    return found(
        do_pad=geometry == "pad", do_resize=True, size=size, resample=Image.Resampling(spec.resample), crop_size=square,
        do_center_crop=geometry == "crop", do_normalize=True, image_mean=list(spec.mean), image_std=list(spec.std),
    )  # fmt: skip


def to_pixels(image: Image.Image, spec: EncoderSpec, geometry: Geometry) -> Tensor:
    """The encoder's pixels `[3, S, S]` (float32, normalised) of an RGB picture of any size."""
    make = make_image_processor(spec, geometry)
    if image.size != (spec.image_size, spec.image_size):
        return make(image, return_tensors="pt")["pixel_values"][0]
    # Every geometry leaves such a picture as it is: only the processor's last step, in a quarter of the time.
    array = make.process_image(image)[None]
    return make.rescale_and_normalize(array, True, make.rescale_factor, True, make.image_mean, make.image_std)[0]


def covered(spec: EncoderSpec) -> tuple[float, float]:
    """The share of the encoder's square, down and across, that its patches cover: a rest at the end is not read."""
    size, (rows, columns) = spec.image_size, spec.grid
    down, across = (size // count * count / size if count <= size else 1.0 for count in (rows, columns))
    return down, across if rows > 1 else 1.0  # a row of features with CLS tokens has no geometry


def aligned(image: Image.Image, spec: EncoderSpec, geometry: Geometry) -> Image.Image:
    """An RGB picture in its own resolution, exactly the area that the encoder's grid covers.

    Padded with the encoder's mean colour (`pad`), cut to a square (`crop`), or as it is (`resize`, which squashes).
    """
    if geometry == "pad" and image.width != image.height:
        colour = tuple(round(255 * mean) for mean in spec.mean)
        square, side = Image.new("RGB", (max(image.size),) * 2, colour), max(image.size)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    elif geometry == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    down, across = covered(spec)
    if (down, across) == (1.0, 1.0):
        return image
    return image.crop((0, 0, round(image.width * across), round(image.height * down)))


def content_box(size: tuple[int, int], geometry: Geometry) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of the square that is not padding, as fractions; `size` is (width, height)."""
    side, left, top = max(size), (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
    box = (left / side, top / side, (left + size[0]) / side, (top + size[1]) / side)
    return box if geometry == "pad" else (0.0, 0.0, 1.0, 1.0)


def open_image(ref: ImageRef, where: str) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency on white, 16 bits a channel reduced to 8: white is 65,535.

    Raises `SampleError` of kind "image" with the file's path when it is missing, truncated, corrupt or too large.
    """
    source = ref.source
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise ValueError("it is not a file")
        if isinstance(source, Path | bytes):
            image: Image.Image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        else:
            image = source() if callable(source) else source
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS}")
        if max(image.size) > min(MAX_SIDE, MAX_RATIO * min(image.size)):
            limits = f"sides up to {MAX_SIDE} pixels, and one at most {MAX_RATIO} times the other"
            raise ValueError(f"{image.width} x {image.height} pixels are beyond the limits: {limits}")
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            least, most = map(float, image.getextrema())  # type: ignore[arg-type]
            if image.mode == "F" or least < 0 or most >= 2**16:
                raise ValueError("its values have no known range: write it with 8 or 16 bits")
        if image.mode.startswith("I"):  # `I;16`, and the same numbers in 32 bits
            image = image.point(lambda value: value / 256).convert("L")
        if image.mode != "RGB" or "transparency" in image.info:
            array: Any = convert_to_rgb(image, return_numpy=True)
            image = Image.fromarray(array)
        return image
    except Exception as error:  # decoders raise anything from OSError to struct.error
        name = str(source) if isinstance(source, Path) else "a picture"
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error!r})"
        raise SampleError("image", where, f"{name} {problem}") from error
