"""Folders of pictures to Inception features: made comparable, blurred, and never all in memory as pixels.

Knows files, pixels and Inception. Knows nothing of models or of what is measured with the features.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Num, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.inception import Features, Inception
from lightning_dalle.evaluation.protocol import Preparation

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def prepare(picture: Image.Image, preparation: Preparation) -> UInt8[Tensor, "3 h w"]:
    """One picture as an image in 0 to 255."""
    image: Tensor = v2.functional.pil_to_tensor(picture.convert("RGB"))
    if preparation.resize == "clean-fid":
        return v2.functional.resize(image, [299, 299], InterpolationMode.BICUBIC, antialias=True)
    if preparation.image_size is None:
        return image
    smaller = v2.functional.resize(image, [preparation.image_size], InterpolationMode.BILINEAR, antialias=True)
    return v2.functional.center_crop(smaller, [preparation.image_size])


def blur(images: Num[Tensor, "b 3 h w"], radius: int) -> Num[Tensor, "b 3 h w"]:
    """Images under a Gaussian whose deviation is the radius in pixels, cut off at four (paper, Fig. 9a and b).

    The paper does not say how its filter is cut off.

    Raises:
        UserError: if the images are too small for the filter.
    """
    if radius == 0:
        return images
    reach = math.ceil(4 * radius)
    if min(images.shape[-2:]) <= reach:
        raise UserError(f"images of {images.shape[-1]}x{images.shape[-2]} are too small for a blur of radius {radius}")
    return v2.functional.gaussian_blur(images, [2 * reach + 1, 2 * reach + 1], [float(radius), float(radius)])


class ImageSet(NamedTuple):
    """A folder seen by Inception."""

    names: list[str]
    """Of the pictures that could be read, relative to the folder, in order."""
    skipped: dict[str, str]
    """Why each of the others could not be."""
    features: dict[int, Features]
    """By blur radius, a row for each name."""


def pictures_in(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted.

    Raises:
        UserError: if there is no folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder of pictures at {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"{folder} holds no picture ({', '.join(sorted(EXTENSIONS))})")
    return paths


def read_folder(
    folder: Path,
    inception: Inception,
    preparation: Preparation,
    radii: Iterable[int] = (0,),
    batch_size: int = 32,
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImageSet:
    """Features of a folder's pictures; those that cannot be read are passed over and named.

    Args:
        folder: of pictures, at any depth.
        inception: the network, on the device to use.
        preparation: how pictures become images.
        radii: of the blurs, in pixels; 0 is none.
        batch_size: images at once.
        cache_dir: where the features are kept, by a hash of all they depend on; not kept if not given.
        on_progress: told how many pictures of how many are done.

    Raises:
        UserError: if there is no picture, or their sizes differ and `preparation` does not change that.
    """
    radii = list(radii)
    paths = pictures_in(folder)
    key = {
        "contents": _digest(paths, folder), "inception": inception.sha256, "radii": radii, **asdict(preparation)
    }  # fmt: skip
    cached = None
    if cache_dir is not None:
        cached = cache_dir / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.pt"
        if cached.is_file():
            on_progress(len(paths), len(paths))
            return _unpack(torch.load(cached, weights_only=True))

    names: list[str] = []
    skipped: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    parts: dict[int, list[Features]] = {radius: [] for radius in radii}
    device = next(inception.parameters()).device
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            name = str(path.relative_to(folder))
            try:
                with Image.open(path) as picture:
                    images.append(prepare(picture, preparation))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                skipped[name] = str(error)
                continue
            names.append(name)
            sizes[f"{images[-1].shape[-1]}x{images[-1].shape[-2]}"] += 1
        if len(sizes) > 1:
            found = " and ".join(size for size, _ in sizes.most_common(3))
            raise UserError(f"the pictures in {folder} differ in size ({found}): give an image_size to bring them to")
        if images:
            batch = torch.stack(images).to(device)
            for radius in radii:
                parts[radius].append(inception.features(blur(batch, radius)))
        on_progress(min(start + batch_size, len(paths)), len(paths))
    if not names:
        first = next(iter(skipped.items()))
        raise UserError(f"none of the {len(paths)} pictures in {folder} can be read; {first[0]}: {first[1]}")
    made = ImageSet(names, skipped, {radius: Features.join(part) for radius, part in parts.items()})
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        torch.save({**made._asdict(), "features": {r: tuple(f) for r, f in made.features.items()}}, partial)
        partial.rename(cached)  # there whole or not at all
    return made


def _unpack(stored: dict[str, Any]) -> ImageSet:
    features = {radius: Features(*tensors) for radius, tensors in stored["features"].items()}
    return ImageSet(stored["names"], stored["skipped"], features)


def _digest(paths: list[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
