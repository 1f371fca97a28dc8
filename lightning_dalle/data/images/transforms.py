"""Pictures to tensors, and the paper's two augmentations on the way.

Knows RGB pictures of any size, as arrays. Knows nothing of captions or of where pictures come from; all randomness is
an argument.
"""

import random
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import sparse
from torch import Tensor
from torchvision.transforms import v2

from lightning_dalle.data.images.decoding import Pixels, rgb


def middle_square(picture: Pixels, image_size: int) -> Pixels:
    """Of a picture of any size, one of image_size by image_size pixels."""
    if picture.shape[:2] == (image_size, image_size):
        return picture
    return np.asarray(_middle(Image.fromarray(picture), image_size))


def _middle(picture: Image.Image, image_size: int) -> Image.Image:
    """What torchvision's center_crop(resize(picture)) gives, without the resized picture: of a line of 20,000 pixels
    that would take gigabytes.
    """
    if picture.size == (image_size, image_size):
        return picture
    shorter = min(picture.size)
    resized = [image_size * length // shorter for length in picture.size]
    left, top = (round((length - image_size) / 2) for length in resized)
    across, down = (length / of for length, of in zip(picture.size, resized, strict=True))
    box = (left * across, top * down, (left + image_size) * across, (top + image_size) * down)
    return picture.resize((image_size, image_size), Image.Resampling.BILINEAR, box)


def to_float(images: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Bytes to images in [0, 1]."""
    return v2.functional.to_dtype(images.contiguous(), torch.float32, scale=True)


def to_image(picture: Image.Image, image_size: int) -> Float[Tensor, "3 h w"]:
    """The middle square of a PIL image of any size and mode, in [0, 1]."""
    return to_float(torch.tensor(np.asarray(_middle(rgb(picture), image_size))).movedim(-1, 0))


@runtime_checkable
class Augmentation(Protocol):
    """A random square of a picture."""

    def __call__(self, picture: Pixels, image_size: int, rng: random.Random) -> Any:
        """A picture of any size to one of image_size by image_size pixels.

        No view of it: until the batch is made, that would keep the whole picture.
        """
        ...  # Any is Pixels: jsonargparse takes a callable that returns a class for a factory of that class


@dataclass(frozen=True)
class DVAEAugmentation:
    """What the dVAE is trained on (Listing 1): any square of the smaller side, 9/8 to 12/8 of the wanted size or as
    large as it was, any window of that, half of them flipped.
    """

    def __call__(self, picture: Pixels, image_size: int, rng: random.Random) -> Pixels:
        side = min(picture.shape[:2])
        square = random_crop(picture, side, rng)
        smallest, largest = (min(side, round(eighths / 8 * image_size)) for eighths in (9, 12))
        window = random_crop(_shrink(square, rng.randint(smallest, largest), image_size), image_size, rng)
        return (window[:, ::-1] if rng.random() < 0.5 else window).copy()


@dataclass(frozen=True)
class DALLEAugmentation:
    """What the transformer is trained on (Listing 2): a square near the middle, 1 to 9/8 of the wanted size, any window
    of that. Never flipped, since the picture may contain text.
    """

    def __call__(self, picture: Pixels, image_size: int, rng: random.Random) -> Pixels:
        height, width, _ = picture.shape
        side = min(width, height)
        left, top = (_near_the_middle(length - side, rng) for length in (width, height))
        square = picture[top : top + side, left : left + side]
        largest = max(image_size, min(side, round(9 / 8 * image_size)))
        return random_crop(_shrink(square, rng.randint(image_size, largest), image_size), image_size, rng).copy()


def random_crop(picture: Pixels, side: int, rng: random.Random) -> Pixels:
    """A square of so many pixels, from anywhere in the picture."""
    height, width, _ = picture.shape
    left, top = (rng.randint(0, length - side) for length in (width, height))
    return picture[top : top + side, left : left + side]


def area_resize(picture: Pixels, side: int) -> Pixels:
    """A smaller square picture, of side by side pixels, each the mean over its area of the larger one.

    This is TensorFlow 1's resize_images(AREA, align_corners=True), which both listings call: a window is
    (of - 1) / (side - 1) pixels wide, a pixel that it covers in part counts in part, and the last window reaches over
    the edge. PIL's BOX is quicker, but takes or leaves pixels whole: between 1 and 2 pixels a window, where the
    listings are, that is next to picking the nearest, and 32 to 34 dB away on photos.
    """
    if len(picture) == side:
        return picture
    windows = _windows(len(picture), side)
    pixels = picture.astype(np.float32)
    for _ in range(2):  # along one axis, then the other
        pixels = (windows @ pixels.reshape(len(pixels), -1)).reshape(side, -1, 3).swapaxes(0, 1)
    return np.rint(pixels).astype(np.uint8)


def _windows(of: int, to: int) -> sparse.csr_array:
    """The share of each of so many pixels in each window, (to, of)."""
    width = np.float32((of - 1) / (to - 1))
    left = np.arange(to, dtype=np.float32)[:, None] * width
    pixel = np.floor(left) + np.arange(int(width) + 2, dtype=np.float32)
    share = np.clip(np.minimum(left + width, pixel + 1) - np.maximum(left, pixel), 0, None) / width
    places = (np.repeat(np.arange(to), pixel.shape[1]), np.minimum(pixel, of - 1).astype(int).ravel())
    return sparse.csr_array((share.ravel(), places), shape=(to, of))


def _shrink(square: Pixels, side: int, least: int) -> Pixels:
    """By area, but enlarged where the picture is smaller than the least side, with which the listings would fail."""
    return middle_square(square, least) if len(square) < least else area_resize(square, side)


def _near_the_middle(slack: int, rng: random.Random) -> int:
    """An offset in [3/8, 5/8) of the slack."""
    return rng.randrange(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8))
