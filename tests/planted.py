"""Copies of an image as they are common on the web: rescaled, recompressed, cropped, brighter or darker."""

import io
import random
from collections.abc import Callable

from PIL import Image, ImageEnhance

Change = Callable[[Image.Image, random.Random], Image.Image]

FILTERS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def rescaled(image: Image.Image, rng: random.Random) -> Image.Image:
    """Rescale an image by a random factor from a quarter to two."""
    factor = 2 ** rng.uniform(-2, 1)
    return image.resize((round(image.width * factor), round(image.height * factor)), rng.choice(FILTERS))


def recompressed(image: Image.Image, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=rng.randint(30, 90))
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, rng: random.Random, least: float = 0.9, most: float = 1.0) -> Image.Image:
    """Crop a random part of an image: width and height are both between `least` and `most` of the original."""
    edges = []
    for length in image.size:
        kept = rng.uniform(least, most)
        first = rng.uniform(0, 1 - kept)
        edges.append((round(first * length), round((first + kept) * length)))
    (left, right), (top, bottom) = edges
    return image.crop((left, top, right, bottom))


def cropped_by_a_tenth(image: Image.Image, rng: random.Random) -> Image.Image:
    return cropped(image, rng, most=0.9)


def brightened(image: Image.Image, rng: random.Random) -> Image.Image:
    """Make an image randomly brighter or darker."""
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))


KINDS: dict[str, tuple[Change, ...]] = {
    "rescaled": (rescaled,),
    "recompressed": (recompressed,),
    "cropped": (cropped,),
    "cropped by a tenth": (cropped_by_a_tenth,),
    "brightness": (brightened,),
    "cropped, brightness": (cropped, brightened),
    "all": (cropped, rescaled, brightened, recompressed),
    "all, cropped by a tenth": (cropped_by_a_tenth, rescaled, brightened, recompressed),
}


def make_copy(image: Image.Image, kind: str, seed: str) -> Image.Image:
    """Return a random copy of an image, by kind and seed."""
    rng = random.Random(f"{kind} {seed}")
    for change in KINDS[kind]:
        image = change(image, rng)
    return image
