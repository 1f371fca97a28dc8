"""Pictures of a folder or of a dataset to Inception features: made comparable, blurred, and never all in memory as
pixels.

Knows files, pixels and Inception. Knows nothing of models or of what is measured with the features.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets import Image as EncodedImage
from jaxtyping import Num, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lightning_dalle.data.images.decoding import Unreadable, content, read_picture, rgb
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.inception import Features, Inception
from lightning_dalle.evaluation.protocol import Preparation

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

RECIPE = 2
"""Of how pictures are opened and prepared; another one makes features that were kept unfit."""


def prepare(picture: Image.Image, preparation: Preparation) -> UInt8[Tensor, "3 h w"]:
    """One picture as an image in 0 to 255."""
    image: Tensor = v2.functional.pil_to_tensor(rgb(picture))
    if preparation.resize == "clean-fid":
        # In floats, as clean-fid does: of bytes torchvision's weights are integers, and edges come out levels apart.
        resized = v2.functional.resize(image.float(), [299, 299], InterpolationMode.BICUBIC, antialias=True)
        return resized.clamp(0, 255).round().byte()
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


class Pictures(NamedTuple):
    """Pictures that can be opened one by one."""

    origin: str
    """Where they are from, for messages."""
    names: list[str]
    open: Callable[[int], Image.Image]
    """The picture of a name, by its index; raises `Unreadable`."""
    digest: str
    """Hash of all names and contents."""


class ImageSet(NamedTuple):
    """Pictures seen by Inception."""

    names: list[str]
    """Of those that could be read, in order."""
    skipped: dict[str, str]
    """Why each of the others could not be."""
    features: dict[int, Features]
    """By blur radius, a row for each name."""
    sizes: list[str]
    """Of the images, each once, as 64x32."""


class Processes(NamedTuple):
    """Those that share the work; they meet at the barrier, and see the same files."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


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


def folder_pictures(folder: Path) -> Pictures:
    """Those below a folder, named relative to it."""
    paths = pictures_in(folder)
    names = [str(path.relative_to(folder)) for path in paths]
    images = [{"bytes": None, "path": str(path)} for path in paths]
    return Pictures(str(folder), names, lambda i: read_picture(images[i]), _digest(names, images))


def names_of(rows: Dataset) -> list[str]:
    """What the picture of each row is called: its id, in a mixture after its source's number, or else the row's number.

    Rows of one name show the same picture.
    """
    if "id" not in rows.column_names:
        return [str(i) for i in range(len(rows))]
    ids: list[str] = rows["id"][:]
    if "source" not in rows.column_names:
        return ids
    return [f"{source}/{id}" for source, id in zip(rows["source"][:], ids, strict=True)]


def dataset_pictures(rows: Dataset, origin: str) -> Pictures:
    """Those of a dataset with the column image, a row for each."""
    names = names_of(rows)
    encoded = rows.select_columns("image").cast_column("image", EncodedImage(decode=False))
    digest = _digest(names, (row["image"] for row in encoded))
    return Pictures(origin, names, lambda i: read_picture(encoded[i]["image"]), digest)


def read_pictures(
    pictures: Pictures,
    inception: Inception,
    preparation: Preparation,
    radii: Iterable[int] = (0,),
    batch_size: int = 32,
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = Processes(),  # noqa: B008 (immutable)
) -> ImageSet:
    """Features of pictures; those that cannot be read are passed over and named.

    Several processes each read their own share, each picture once, and all return the whole.

    Args:
        pictures: to be read.
        inception: the network, on the device to use.
        preparation: how pictures become images.
        radii: of the blurs, in pixels; 0 is none.
        batch_size: images at once.
        cache_dir: where the features are kept, by a hash of all they depend on; needed if there are several processes.
        on_progress: told how many pictures of how many are done.
        processes: that share the work.

    Raises:
        UserError: if no picture can be read, or their sizes differ and `preparation` does not change that.
    """
    radii = list(radii)
    key = {
        "recipe": RECIPE, "contents": pictures.digest, "inception": inception.sha256, "radii": radii,
        **asdict(preparation),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def read(rank: int) -> ImageSet:
        if cache_dir is None:
            return _read_share(pictures, rank, processes.world, inception, preparation, radii, batch_size, on_progress)
        file = cache_dir / f"{name}.{rank}of{processes.world}.pt"
        if file.is_file():
            on_progress(len(pictures.names), len(pictures.names))
            return _unpack(torch.load(file, weights_only=True))
        made = _read_share(pictures, rank, processes.world, inception, preparation, radii, batch_size, on_progress)
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save({**made._asdict(), "features": {r: tuple(f) for r, f in made.features.items()}}, partial)
        partial.rename(file)  # there whole or not at all
        return made

    mine = read(processes.rank)
    processes.barrier()
    shares = [mine if rank == processes.rank else read(rank) for rank in range(processes.world)]
    skipped = {name: reason for share in shares for name, reason in share.skipped.items()}
    if not any(share.names for share in shares):
        first = next(iter(skipped.items()))
        raise UserError(f"none of the {len(skipped)} pictures in {pictures.origin} can be read; {first[0]}: {first[1]}")
    sizes = sorted({size for share in shares for size in share.sizes})
    _check_sizes(sizes, pictures.origin)  # again, since those of one process may all differ from those of another
    # Back in the order of the pictures: the Inception Score is split by it.
    names = [name for share in shares for name in share.names]
    place = {name: i for i, name in enumerate(pictures.names)}
    order = sorted(range(len(names)), key=lambda i: place[names[i]])
    joined = {radius: Features.join([share.features[radius] for share in shares if share.names]) for radius in radii}
    return ImageSet([names[i] for i in order], skipped, {radius: f.take(order) for radius, f in joined.items()}, sizes)


def _read_share(
    pictures: Pictures,
    rank: int,
    count: int,
    inception: Inception,
    preparation: Preparation,
    radii: list[int],
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> ImageSet:
    """Every count-th picture, from the rank-th on."""
    names: list[str] = []
    skipped: dict[str, str] = {}
    sizes: dict[str, None] = {}
    parts: dict[int, list[Features]] = {radius: [] for radius in radii}
    device = next(inception.parameters()).device
    indices = range(rank, len(pictures.names), count)
    for start in range(0, len(indices), batch_size):
        images = []
        for i in indices[start : start + batch_size]:
            name = pictures.names[i]
            try:
                images.append(prepare(pictures.open(i), preparation))
            except Unreadable as error:
                skipped[name] = error.reason
                continue
            names.append(name)
            sizes[f"{images[-1].shape[-1]}x{images[-1].shape[-2]}"] = None
        _check_sizes(list(sizes), pictures.origin)
        if images:
            batch = torch.stack(images).to(device)
            for radius in radii:
                parts[radius].append(inception.features(blur(batch, radius)))
        on_progress(min(start + batch_size, len(indices)), len(indices))
    return ImageSet(
        names, skipped, {radius: Features.join(part) for radius, part in parts.items() if part}, list(sizes)
    )


def _check_sizes(sizes: list[str], origin: str) -> None:
    if len(sizes) > 1:
        raise UserError(
            f"the pictures in {origin} differ in size ({' and '.join(sizes[:3])}): give an image_size to bring them to"
        )


def _unpack(stored: dict[str, Any]) -> ImageSet:
    features = {radius: Features(*tensors) for radius, tensors in stored["features"].items()}
    return ImageSet(stored["names"], stored["skipped"], features, stored["sizes"])


def _digest(names: Iterable[str], images: Iterable[Mapping[str, Any] | None]) -> str:
    digest = hashlib.sha256()
    for name, image in zip(names, images, strict=True):
        try:
            encoded = content(image)
        except Unreadable as error:
            encoded = error.reason.encode()
        digest.update(name.encode() + b"\0" + hashlib.sha256(encoded).digest())
    return digest.hexdigest()
