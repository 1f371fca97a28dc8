"""Copies of a picture such as the web is full of."""

import io
import random
from collections.abc import Callable

from PIL import Image, ImageEnhance

Change = Callable[[Image.Image, random.Random], Image.Image]

FILTERS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def rescaled(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A quarter to twice as large."""
    factor = 2 ** rng.uniform(-2, 1)
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), rng.choice(FILTERS))


def recompressed(picture: Image.Image, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=rng.randint(30, 90))
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image, rng: random.Random, least: float = 0.9, most: float = 1.0) -> Image.Image:
    """Of the width and of the height so much is left, from anywhere."""
    edges = []
    for length in picture.size:
        kept = rng.uniform(least, most)
        first = rng.uniform(0, 1 - kept)
        edges.append((round(first * length), round((first + kept) * length)))
    (left, right), (top, bottom) = edges
    return picture.crop((left, top, right, bottom))


def cropped_by_a_tenth(picture: Image.Image, rng: random.Random) -> Image.Image:
    return cropped(picture, rng, most=0.9)


def brightened(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Or darkened."""
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.7, 1.3))


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


def planted(picture: Image.Image, kind: str, seed: str) -> Image.Image:
    """A copy of a kind."""
    rng = random.Random(f"{kind} {seed}")
    for change in KINDS[kind]:
        picture = change(picture, rng)
    return picture
