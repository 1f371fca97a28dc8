"""Center crops and the paper's two random augmentations of RGB images, and their conversion to tensors."""

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

from lightning_dalle.data.images.decoding import Pixels, to_rgb


def center_crop(image: Pixels, image_size: int) -> Pixels:
    """Resize an image so that its shorter side is `image_size`, and crop the central square."""
    if image.shape[:2] == (image_size, image_size):
        return image
    return np.asarray(_resize_and_crop(Image.fromarray(image), image_size))


def _resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Return torchvision's center_crop(resize(image)) in a single step.

    Resizing an image of 1 by 20,000 pixels before the crop would take gigabytes.
    """
    shorter = min(image.size)
    resized = [image_size * length // shorter for length in image.size]
    left, top = (round((length - image_size) / 2) for length in resized)
    scale_x, scale_y = (length / new for length, new in zip(image.size, resized, strict=True))
    box = (left * scale_x, top * scale_y, (left + image_size) * scale_x, (top + image_size) * scale_y)
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box)


def to_float(images: UInt8[Tensor, "*b 3 h w"] | Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Convert images from uint8 to floats in [0, 1]; keep the values of floats."""
    return v2.functional.to_dtype(images.contiguous(), torch.float32, scale=True)


def to_image(image: Image.Image, image_size: int) -> Float[Tensor, "3 h w"]:
    """Convert a PIL image of any size and mode to its central square, in [0, 1]."""
    return to_float(torch.tensor(np.asarray(_resize_and_crop(to_rgb(image), image_size))).movedim(-1, 0))


@runtime_checkable
class Augmentation(Protocol):
    """Random square crop of an image."""

    def __call__(self, image: Pixels, image_size: int, rng: random.Random) -> Any:
        """Return a random crop of image_size by image_size pixels from an image of any size.

        The result must be a copy: a view would keep the whole image in memory until the batch is made.
        """
        ...  # Any means Pixels: jsonargparse takes a callable that returns a class for a factory of that class


@dataclass(frozen=True)
class DVAEAugmentation:
    """Augmentation of the dVAE's training images (paper, Listing 1).

    Crops a random square as large as the shorter side, shrinks it to 9/8 to 12/8 of the image size, crops a random
    window, and flips half of the windows. A smaller square keeps its size, or is enlarged to the image size.
    """

    def __call__(self, image: Pixels, image_size: int, rng: random.Random) -> Pixels:
        side = min(image.shape[:2])
        square = random_crop(image, side, rng)
        smallest, largest = (min(side, round(eighths / 8 * image_size)) for eighths in (9, 12))
        window = random_crop(_resize(square, rng.randint(smallest, largest), image_size), image_size, rng)
        return (window[:, ::-1] if rng.random() < 0.5 else window).copy()


@dataclass(frozen=True)
class DALLEAugmentation:
    """Augmentation of the transformer's training images (paper, Listing 2).

    Crops a square near the center, shrinks it to 8/8 to 9/8 of the image size, and crops a random window. Nothing is
    flipped, since the image may contain text.
    """

    def __call__(self, image: Pixels, image_size: int, rng: random.Random) -> Pixels:
        height, width, _ = image.shape
        side = min(width, height)
        left, top = (  # in [3/8, 5/8) of the slack around the square
            rng.randrange(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8))
            for slack in (width - side, height - side)
        )
        square = image[top : top + side, left : left + side]
        largest = max(image_size, min(side, round(9 / 8 * image_size)))
        return random_crop(_resize(square, rng.randint(image_size, largest), image_size), image_size, rng).copy()


def random_crop(image: Pixels, side: int, rng: random.Random) -> Pixels:
    """Crop a square of side by side pixels at a uniformly random position."""
    height, width, _ = image.shape
    left, top = (rng.randint(0, length - side) for length in (width, height))
    return image[top : top + side, left : left + side]


def area_resize(image: Pixels, side: int) -> Pixels:
    """Shrink a square image to side by side pixels, each the mean over its area.

    Equals TensorFlow 1's resize_images(AREA, align_corners=True), which both listings call: a window is
    (old_side - 1) / (side - 1) pixels wide, weighs partly covered pixels by their covered fraction, and extends beyond
    the edge at the end. PIL's BOX is faster but rounds windows to whole pixels. For windows of 1 to 2 pixels, as in
    the listings, BOX is close to nearest-neighbor: its PSNR to this function is 32 to 34 dB on photos.
    """
    if len(image) == side:
        return image
    weights = _window_weights(len(image), side)
    pixels = image.astype(np.float32)
    for _ in range(2):  # along one axis, then the other
        pixels = (weights @ pixels.reshape(len(pixels), -1)).reshape(side, -1, 3).swapaxes(0, 1)
    return np.rint(pixels).astype(np.uint8)


def _window_weights(old_side: int, side: int) -> sparse.csr_array:
    """Return the weight of each old pixel in each new one, (side, old_side)."""
    width = np.float32((old_side - 1) / (side - 1))
    left = np.arange(side, dtype=np.float32)[:, None] * width
    pixel = np.floor(left) + np.arange(int(width) + 2, dtype=np.float32)
    weight = np.clip(np.minimum(left + width, pixel + 1) - np.maximum(left, pixel), 0, None) / width
    indices = (np.repeat(np.arange(side), pixel.shape[1]), np.minimum(pixel, old_side - 1).astype(int).ravel())
    return sparse.csr_array((weight.ravel(), indices), shape=(side, old_side))


def _resize(square: Pixels, side: int, min_side: int) -> Pixels:
    """Shrink a square by area, or enlarge one that is smaller than `min_side`, on which the listings would fail."""
    return center_crop(square, min_side) if len(square) < min_side else area_resize(square, side)
