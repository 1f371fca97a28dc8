"""Inception features of the images in a folder or dataset, after resizing and blur, with a cache on disk."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets import Image as EncodedImage
from jaxtyping import Num, UInt8
from PIL import Image
from rich.progress import track
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lightning_dalle.data.images import decoding
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.inception import Features, Inception
from lightning_dalle.evaluation.protocol import ImagePreprocessing, Protocol
from lightning_dalle.files import atomic_write

CACHE_VERSION = 2
"""Version of decoding and preprocessing; raise it when they change, so that cached features are computed again."""


def preprocess(image: Image.Image, preprocessing: ImagePreprocessing) -> UInt8[Tensor, "3 h w"]:
    """Return an image as uint8 RGB, resized and cropped by the method and to the size of `preprocessing`."""
    pixels: Tensor = v2.functional.pil_to_tensor(decoding.to_rgb(image))
    if preprocessing.resize == "clean-fid":
        # In float, as clean-fid does: for uint8, torchvision uses integer weights, which alters pixels at edges.
        resized = v2.functional.resize(pixels.float(), [299, 299], InterpolationMode.BICUBIC, antialias=True)
        return resized.clamp(0, 255).round().byte()
    if preprocessing.image_size is None:
        return pixels
    smaller = v2.functional.resize(pixels, [preprocessing.image_size], InterpolationMode.BILINEAR, antialias=True)
    return v2.functional.center_crop(smaller, [preprocessing.image_size])


def blur(images: Num[Tensor, "b 3 h w"], radius: int) -> Num[Tensor, "b 3 h w"]:
    """Apply a Gaussian blur with a standard deviation of `radius` pixels (paper, Fig. 9a and b).

    The paper gives no filter size; this filter extends to four standard deviations on each side.

    Raises:
        UserError: if the shorter side of the images is at most four standard deviations.
    """
    if radius == 0:
        return images
    reach = math.ceil(4 * radius)
    if min(images.shape[-2:]) <= reach:
        raise UserError(
            f"images of {images.shape[-1]}x{images.shape[-2]} pixels are too small for a blur of radius {radius}: "
            f"remove {radius} from the protocol's blur_radii"
        )
    return v2.functional.gaussian_blur(images, [2 * reach + 1, 2 * reach + 1], [float(radius), float(radius)])


class ImageList(NamedTuple):
    """Names of the images of a folder or dataset, and a function that decodes one of them."""

    data_name: str
    """Path of the folder, or name of the dataset, for messages and results."""
    names: list[str]
    """Name of each image: its relative path, or its id in the dataset."""
    decode: Callable[[int], Image.Image]
    """Function that decodes the image at an index of `names`, or raises `UnreadableImage`."""
    digest: str
    """Hash of the names and encoded bytes of all images."""
    ignored: Mapping[str, int] = MappingProxyType({})
    """Number of files in the folder that are not images, by suffix."""


class FeatureSet(NamedTuple):
    """Inception features of those images of an `ImageList` that can be decoded."""

    names: list[str]
    """Names of the decoded images, in the order of the `ImageList`."""
    skipped: dict[str, str]
    """Reason why each unreadable image was skipped, by image name."""
    features: dict[int, Features]
    """Features by blur radius in pixels; row i belongs to the image `names[i]`."""
    sizes: list[str]
    """Distinct sizes of the preprocessed images as width x height, such as 64x32."""

    def counts(self) -> dict[str, Any]:
        """Return the numbers of decoded and of skipped images, with the reasons for the first ten skipped ones."""
        first = dict(list(self.skipped.items())[:10])
        return {"images": len(self.names), "skipped": len(self.skipped), "first_skipped": first}


class DistributedContext(NamedTuple):
    """Rank and world size of processes that divide one evaluation and share a file system; by default one process."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    """Function that blocks until all processes have called it."""

    def indices(self, count: int) -> range:
        """Return the indices, below `count`, of the items that this process works on."""
        return range(self.rank, count, self.world_size)


def images_in_folder(folder: Path) -> ImageList:
    """List the images in a folder and its subfolders, named by their path relative to the folder.

    Raises:
        UserError: if the folder does not exist or contains no image.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder of images at {folder}: correct the path")
    paths, ignored = decoding.find_images(folder)
    if not paths:
        raise UserError(
            f"{folder} contains no image and {ignored.total()} other files: correct the path, or add images that "
            f"end in {', '.join(sorted(decoding.IMAGE_EXTENSIONS))}"
        )
    names = [str(path.relative_to(folder)) for path in paths]
    images = [{"bytes": None, "path": str(path)} for path in paths]
    return ImageList(
        str(folder), names, lambda i: decoding.decode_pil(images[i]), _digest(names, images), dict(ignored)
    )


def image_names(rows: Dataset) -> list[str]:
    """Return the name of each row's image: source/id in a mixture of datasets, else the id, else the row number.

    Rows with equal names show the same image.
    """
    if "id" not in rows.column_names:
        return [str(i) for i in range(len(rows))]
    ids: list[str] = rows["id"][:]
    if "source" not in rows.column_names:
        return ids
    return [f"{source}/{id}" for source, id in zip(rows["source"][:], ids, strict=True)]


def images_in_dataset(rows: Dataset, data_name: str) -> ImageList:
    """List the images in the column `image` of a dataset, one per row; `data_name` appears in messages and results."""
    names = image_names(rows)
    encoded = rows.select_columns("image").cast_column("image", EncodedImage(decode=False))
    digest = _digest(names, (row["image"] for row in encoded))
    return ImageList(data_name, names, lambda i: decoding.decode_pil(encoded[i]["image"]), digest)


@dataclass(frozen=True)
class FeatureExtractor:
    """Extractor of the Inception features that a protocol needs, with an optional cache on disk.

    Several processes divide the images among them, and each process returns the features of all images.
    """

    inception: Inception
    """Network that computes the features, on the device to use."""
    protocol: Protocol
    """Settings of resizing and blur; each blur radius has separate features."""
    cache_dir: Path | None = None
    """Folder for a cache of features, keyed by a hash of images, weights and settings; required for several processes,
    which exchange their features through it."""
    batch_size: int = 32
    """Number of images per forward pass. The last bits of the features, and so of FID, depend on this number."""
    context: DistributedContext = DistributedContext()  # noqa: RUF009 (immutable)
    """Rank and world size of this process."""

    def __call__(self, images: ImageList) -> FeatureSet:
        """Return the features of images; unreadable images are skipped and listed in `skipped`.

        Raises:
            UserError: if no image can be decoded, or their sizes differ after preprocessing.
        """
        radii, preprocessing, context = self.protocol.blur_radii, self.protocol.preprocessing, self.context
        device = next(self.inception.parameters()).device
        key = {
            "recipe": CACHE_VERSION, "contents": images.digest, "inception": self.inception.sha256, "radii": radii,
            **asdict(preprocessing),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

        def extract(indices: range) -> FeatureSet:
            names: list[str] = []
            skipped: dict[str, str] = {}
            sizes: dict[str, None] = {}
            parts: dict[int, list[Features]] = {radius: [] for radius in radii}
            for start in track(range(0, len(indices), self.batch_size), "Reading images"):
                batch = []
                for i in indices[start : start + self.batch_size]:
                    name = images.names[i]
                    try:
                        batch.append(preprocess(images.decode(i), preprocessing))
                    except decoding.UnreadableImage as error:
                        skipped[name] = error.reason
                        continue
                    names.append(name)
                    sizes[f"{batch[-1].shape[-1]}x{batch[-1].shape[-2]}"] = None
                _check_sizes(list(sizes), images.data_name)
                if batch:
                    stacked = torch.stack(batch).to(device)
                    for radius in radii:
                        parts[radius].append(self.inception.features(blur(stacked, radius)))
            features = {radius: Features.join(part) for radius, part in parts.items() if part}
            return FeatureSet(names, skipped, features, list(sizes))

        def read(rank: int) -> FeatureSet:
            indices = DistributedContext(rank, context.world_size).indices(len(images.names))
            if self.cache_dir is None:
                return extract(indices)
            file = self.cache_dir / f"{name}.{rank}of{context.world_size}.pt"
            if file.is_file():
                stored = torch.load(file, weights_only=True)
                return FeatureSet(**stored | {"features": {r: Features(*f) for r, f in stored["features"].items()}})
            part = extract(indices)
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as partial:
                torch.save({**part._asdict(), "features": {r: tuple(f) for r, f in part.features.items()}}, partial)
            return part

        own = read(context.rank)
        context.barrier()
        parts = [own if rank == context.rank else read(rank) for rank in range(context.world_size)]
        skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
        parts = [part for part in parts if part.names]
        if not parts:
            name, reason = next(iter(skipped.items()))
            raise UserError(
                f"cannot decode any of the {len(skipped)} images in {images.data_name} (the first, {name}: {reason}): "
                "replace the files, or correct the path"
            )
        sizes = sorted({size for part in parts for size in part.sizes})
        _check_sizes(sizes, images.data_name)  # checked again, since each process saw only its own images
        # The order of the images is restored, since the splits of the Inception Score depend on it.
        names = [name for part in parts for name in part.names]
        position = {name: i for i, name in enumerate(images.names)}
        order = sorted(range(len(names)), key=lambda i: position[names[i]])
        features = {radius: Features.join([part.features[radius] for part in parts]).take(order) for radius in radii}
        return FeatureSet([names[i] for i in order], skipped, features, sizes)


def _check_sizes(sizes: list[str], data_name: str) -> None:
    if len(sizes) > 1:
        found = " and ".join(sizes[:3])
        raise UserError(f"images in {data_name} differ in size ({found}): set preprocessing.image_size in the protocol")


def _digest(names: Iterable[str], images: Iterable[Mapping[str, Any] | None]) -> str:
    digest = hashlib.sha256()
    for name, image in zip(names, images, strict=True):
        try:
            encoded = decoding.read_bytes(image)
        except decoding.UnreadableImage as error:
            encoded = error.reason.encode()
        digest.update(name.encode() + b"\0" + hashlib.sha256(encoded).digest())
    return digest.hexdigest()
