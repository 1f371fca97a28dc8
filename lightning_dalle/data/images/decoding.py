"""An undecoded picture to RGB, whatever it was: the one place that opens what strangers have made.

Knows files and their bytes. Knows nothing of captions, of the size that is wanted or of training.
"""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
"""What is opened, tried in this order. Pillow knows more, but hands some of them, such as EPS, to other programs."""

MAX_PIXELS = 89_478_485
"""A quarter of a GiB of RGB, which is where Pillow begins to warn of decompression bombs."""


Pixels = UInt8[np.ndarray, "_ _ 3"]
"""Of an RGB picture of any height and width."""

UNREACHABLE = "unreachable picture"
"""The one reason that says nothing of the picture: the network failed, and may not the next time."""


class Unreadable(ValueError):
    """A record that cannot be trained on.

    Args:
        reason: a few words that are the same for all such records, to be counted by.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_picture(image: Mapping[str, Any] | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `read_pixels`, a PIL image of mode RGB."""
    return Image.fromarray(read_pixels(image, max_pixels))


def read_pixels(image: Mapping[str, Any] | None, max_pixels: int = MAX_PIXELS) -> Pixels:
    """A picture in RGB and upright: turned as EXIF says, transparency laid on white, of an animation the first frame.

    Args:
        image: the column of a `datasets.Image(decode=False)`: "bytes", or else the "path" of a file or a URL.
        max_pixels: a picture of more is refused by its header, before it is decoded. Pillow refuses twice `MAX_PIXELS`.

    Raises:
        Unreadable: with one of the reasons "without a picture", "zero bytes", "too many pixels", "unreadable picture",
            "unreachable picture" (of a URL).
    """
    encoded = content(image)
    picture = _opened(encoded, max_pixels)
    if picture.format == "JPEG" and picture.mode in ("RGB", "L") and _is_upright(picture):
        # Pillow takes half as long again, or twice, for the very same pixels. Of what is damaged it stays the judge.
        with contextlib.suppress(Exception):
            return decode_jpeg(encoded, "RGB")
    try:
        picture.load()
    except Exception as error:  # Pillow's decoders raise anything on broken files
        raise Unreadable("unreadable picture") from error
    # If it fails, what is broken is the EXIF, as it often is on the web: the pixels are well.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)
    try:
        return np.asarray(rgb(picture))
    except Exception as error:
        raise Unreadable("unreadable picture") from error


def _is_upright(picture: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # broken EXIF turns nothing
        return picture.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return True


def picture_size(image: Mapping[str, Any] | None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as they are stored, before a quarter turn that EXIF may ask for; no pixel is decoded.

    Raises:
        Unreadable: as `read_pixels` does, as far as the header tells.
    """
    return _opened(content(image), max_pixels).size


def _opened(encoded: bytes, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unreadable("too many pixels") from error
    except Exception as error:  # as above
        raise Unreadable("unreadable picture") from error
    if picture.width * picture.height > max_pixels:
        raise Unreadable("too many pixels")
    return picture


def content(image: Mapping[str, Any] | None) -> bytes:
    """A picture's bytes, of whatever they are.

    Raises:
        Unreadable: with one of the reasons "without a picture", "zero bytes", "unreadable picture".
    """
    encoded = _bytes(image)
    if not encoded:
        raise Unreadable("zero bytes")
    return encoded


def _bytes(image: Mapping[str, Any] | None) -> bytes:
    if image is not None and image["bytes"] is not None:
        return image["bytes"]
    if image is None or not image["path"]:
        raise Unreadable("without a picture")
    path = image["path"]
    is_local = "://" not in path
    try:
        if is_local:
            return Path(path).read_bytes()
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise Unreadable("without a picture") from error
    except Exception as error:  # file systems, and those of the network, raise anything
        raise Unreadable("unreadable picture" if is_local else UNREACHABLE) from error


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB: transparency laid on white, 16 bits scaled to 8; of RGB the very same."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8 rather than scale
        sixteen = np.asarray(picture).clip(0, 65535)
        return Image.fromarray((sixteen >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floats, of which nobody knows what is white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")
