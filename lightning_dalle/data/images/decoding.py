"""Images of any file format, decoded to upright RGB, and the search for image files in a folder."""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
"""Image formats that are decoded, tried in this order. Pillow passes some others, such as EPS, to other programs."""

IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Extensions of image files, in lower case."""

MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image: a quarter of a GiB of RGB, above which Pillow warns of decompression bombs."""

Pixels = UInt8[np.ndarray, "_ _ 3"]
"""RGB image of any height and width."""

UNREACHABLE_IMAGE = "unreachable image"
"""Reason for an image whose URL failed, which may be readable later."""


class UnreadableImage(ValueError):
    """Error for a missing or broken image; its message is a short reason, by which such records are counted."""

    @property
    def reason(self) -> str:
        """Message of the error, such as "empty image file"."""
        return str(self)


def find_images(folder: Path, captions: Collection[str] = ()) -> tuple[list[Path], Counter[str]]:
    """Return all image files below a folder, sorted, and the number of ignored files by suffix.

    Logs a warning if there are images and other files. Neither hidden files nor files with one of the suffixes
    `captions` are counted.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    ignored = Counter(path.suffix.lower() for path in files)
    for suffix in {*IMAGE_EXTENSIONS, *captions}:
        del ignored[suffix]
    if images and ignored:
        counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common())
        files_are = "file that is not an image" if ignored.total() == 1 else "files that are not images"
        log.warning("%s/: ignored %d %s (%s)", folder, ignored.total(), files_are, counts)
    return images, ignored


def decode_pil(image: Mapping[str, Any] | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to a PIL image of mode RGB; see `decode_image`."""
    return Image.fromarray(decode_image(image, max_pixels))


def decode_image(image: Mapping[str, Any] | None, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image to upright RGB.

    EXIF rotation is applied, transparent pixels become white, and an animation yields its first frame.

    Args:
        image: value of a `datasets.Image(decode=False)` column: "bytes", or else the "path" of a file or a URL.
        max_pixels: maximum number of pixels; larger images are rejected by their header. Pillow itself rejects
            images of more than twice `MAX_PIXELS`.

    Raises:
        UnreadableImage: with one of the reasons "missing image", "empty image file", "oversized image",
            "unreadable image", or "unreachable image" if a URL fails.
    """
    encoded = read_bytes(image)
    opened = _open(encoded, max_pixels)
    if opened.format == "JPEG" and opened.mode in ("RGB", "L") and _is_upright(opened):
        # simplejpeg returns the same pixels in half to two thirds of Pillow's time. If it fails, Pillow decides.
        with contextlib.suppress(Exception):
            return decode_jpeg(encoded, "RGB")
    try:
        opened.load()
        with contextlib.suppress(Exception):  # many images on the web have broken EXIF data and intact pixels
            ImageOps.exif_transpose(opened, in_place=True)
        return np.asarray(to_rgb(opened))
    except Exception as error:  # Pillow's decoders raise exceptions of any type on broken files
        raise UnreadableImage("unreadable image") from error


def _is_upright(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # broken EXIF data
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return True


def stored_size(image: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return width and height from the header, before EXIF rotation; no pixel is decoded.

    Raises:
        UnreadableImage: for the reasons of `decode_image` that the header reveals.
    """
    return _open(read_bytes(image), MAX_PIXELS).size


def _open(encoded: bytes, max_pixels: int) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableImage("oversized image") from error
    except Exception as error:  # Pillow raises exceptions of any type on broken files
        raise UnreadableImage("unreadable image") from error
    if opened.width * opened.height > max_pixels:
        raise UnreadableImage("oversized image")
    return opened


def read_bytes(image: Mapping[str, Any] | None) -> bytes:
    """Return an image's encoded bytes, from memory, a file or a URL.

    Raises:
        UnreadableImage: for the reasons of `decode_image` that need no decoding.
    """
    encoded, path = (image["bytes"], image["path"]) if image is not None else (None, None)
    if encoded is None:
        if not path:
            raise UnreadableImage("missing image")
        is_local = "://" not in path
        try:
            with Path(path).open("rb") if is_local else fsspec.open(path, "rb") as file:
                encoded = file.read()
        except FileNotFoundError as error:
            raise UnreadableImage("missing image") from error
        except Exception as error:  # local and remote file systems raise exceptions of any type
            raise UnreadableImage("unreadable image" if is_local else UNREACHABLE_IMAGE) from error
    if not encoded:
        raise UnreadableImage("empty image file")
    return encoded


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency over white, 16 bits scaled to 8; RGB is returned unchanged.

    Raises:
        ValueError: if the pixels are floats, whose value of white is unknown.
    """
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8 instead of scaling
        sixteen = np.asarray(image).clip(0, 65535)
        return Image.fromarray((sixteen >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("cannot convert an image of floats to RGB: the value of white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
