"""Search for near-duplicates: copies of an image that are rescaled, recompressed, cropped, or brighter or darker.

Images are compared by a descriptor of luminance gradients. An index of descriptors at 8x8 pixels, with 36 crops of each
image, returns candidates. Each candidate's crop is then aligned until the descriptors agree best at 32x32 pixels, where
those of different photos hardly agree. Gradients are used since photos of one kind, such as sky above ground, have
similar luminance. The descriptor's length is ignored: a change of brightness scales it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import faiss
import numpy as np
from datasets import Dataset
from jaxtyping import Float
from PIL import Image
from rich.progress import track
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from lightning_dalle.data.images.decoding import UnreadableImage, decode_pil
from lightning_dalle.errors import UserError

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a crop, in pixels of a thumbnail."""

SIDE = 64
"""Side of a thumbnail in pixels."""
COARSE, FINE = 8, 32
"""Sides in pixels of the descriptors that find candidates, and of those that align them."""
_INTERVALS = [(first / 20, 1 - last / 20) for first in range(3) for last in range(3 - first)]
"""Intervals of a side that remain when up to a tenth is cropped, in steps of a twentieth."""
FULL: Box = (0.0, 0.0, float(SIDE), float(SIDE))
CROPS: list[Box] = [
    (SIDE * left, SIDE * top, SIDE * right, SIDE * bottom)
    for (left, right), (top, bottom) in itertools.product(_INTERVALS, _INTERVALS)
]

NUM_CANDIDATES = 3
"""Maximum number of candidates that an image is aligned with."""
MIN_SIMILARITY = 0.6
"""Minimum cosine similarity of a candidate at 8x8 pixels. Copies of photos reach 0.92; 1 of 1,000 other pairs 0.65."""

PREVIEW_SIDE = 160
"""Side in pixels of the preview of a streamed image."""


def thumbnail(image: Image.Image) -> Image.Image:
    """Return the luminance of an image at 64x64 pixels, which is all that comparisons use."""
    return image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)


def gradient_descriptor(thumb: Image.Image, side: int, box: Box = FULL) -> Float[np.ndarray, " d"]:
    """Return the differences of neighboring pixels in a crop, resized to side by side pixels, as a unit vector.

    The vector of a nearly uniform crop is shorter, so that it is similar to none: its differences are noise.
    """
    pixels = np.asarray(thumb.resize((side, side), Image.Resampling.BILINEAR, box), np.float32)
    differences = np.concatenate([np.diff(pixels, axis=axis).ravel() for axis in (0, 1)])
    return differences / max(float(np.linalg.norm(differences)), math.sqrt(differences.size))


def align_crop(copy: Image.Image, original: Image.Image, box: Box) -> float:
    """Return the distance of a thumbnail to the most similar crop of another: 0 if equal, 1 if unrelated.

    Args:
        copy: thumbnail that is compared as a whole.
        original: thumbnail whose crops are compared.
        box: first crop; its edges move by a fortieth of the side, then by less, as long as the similarity grows.
    """
    target = gradient_descriptor(copy, FINE)
    best = float(gradient_descriptor(original, FINE, box) @ target)
    for step in (SIDE / 40, SIDE / 80, SIDE / 160):
        moved = True
        while moved:
            moved = False
            for edge, shift in itertools.product(range(4), (-step, step)):
                edges = [position + shift * (i == edge) for i, position in enumerate(box)]
                if min(edges) < 0 or max(edges) > SIDE or min(edges[2] - edges[0], edges[3] - edges[1]) < SIDE / 2:
                    continue
                shifted: Box = (edges[0], edges[1], edges[2], edges[3])
                similarity = float(gradient_descriptor(original, FINE, shifted) @ target)
                if similarity > best:
                    best, box, moved = similarity, shifted, True
    return 1 - best


class DuplicateIndex:
    """Index of images by the gradient descriptors of their crops; every image has the same `crops`.

    The index is faiss's inverted file: a query is compared with the images in the 8 nearest cells. The number of cells
    is about the square root of the number of crops.
    """

    def __init__(self, thumbnails: Sequence[Image.Image], crops: Sequence[Box]) -> None:
        self.thumbnails, self.crops = thumbnails, crops
        descriptors = np.stack([gradient_descriptor(thumb, COARSE, box) for thumb in thumbnails for box in crops])
        # faiss asks for at least 39 training points per cell.
        cells = max(1, min(math.isqrt(len(descriptors)), len(descriptors) // 39))
        self._index = faiss.index_factory(descriptors.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        faiss.ParameterSpace().set_index_parameter(self._index, "nprobe", 8)
        self._index.train(descriptors)
        self._index.add(descriptors)

    def candidates(self, thumb: Image.Image, crops: Sequence[Box]) -> dict[int, tuple[Box, Box]]:
        """Return {image index: (crop of the image, crop of the query)} of similar images, most similar first."""
        queries = np.stack([gradient_descriptor(thumb, COARSE, box) for box in crops])
        # One more than needed: a query that is itself in the index finds itself.
        similarity, neighbors = self._index.search(queries, (NUM_CANDIDATES + 1) * len(self.crops))
        found: dict[int, tuple[Box, Box]] = {}
        for query, rank in zip(*np.unravel_index(np.argsort(-similarity, axis=None), similarity.shape), strict=True):
            if similarity[query, rank] < MIN_SIMILARITY:
                break
            index, crop = divmod(int(neighbors[query, rank]), len(self.crops))
            found.setdefault(index, (self.crops[crop], crops[query]))
        return found


def find_reference(thumb: Image.Image, references: DuplicateIndex) -> tuple[int, float] | None:
    """Return index and distance of the reference image nearest to a thumbnail, or None if none is similar.

    The reference images must be indexed by all `CROPS`.
    """
    candidates = itertools.islice(references.candidates(thumb, [FULL]).items(), NUM_CANDIDATES)
    distances = ((index, align_crop(thumb, references.thumbnails[index], box)) for index, (box, _) in candidates)
    return min(distances, key=lambda pair: pair[1], default=None)


def find_within(images: DuplicateIndex) -> dict[tuple[int, int], float]:
    """Return the distance of each pair of similar images, keyed by (earlier index, later index).

    The images must be indexed by the crop `FULL` alone.
    """
    found: dict[tuple[int, int], float] = {}
    for original, thumb in enumerate(track(images.thumbnails, "Comparing")):
        candidates = images.candidates(thumb, CROPS)
        candidates.pop(original, None)
        for copy, (_, box) in itertools.islice(candidates.items(), NUM_CANDIDATES):
            pair = (min(original, copy), max(original, copy))
            found[pair] = min(align_crop(images.thumbnails[copy], thumb, box), found.get(pair, 1.0))
    return found


def cluster_duplicates(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return for each image the index of the first image in its cluster, which is its own without duplicates.

    Clusters follow chains of pairs, since an image with a hundred copies is paired with only some of them.
    """
    earlier, later = zip(*pairs, strict=True) if pairs else ((), ())
    graph = sparse.coo_array((np.ones(len(pairs)), (earlier, later)), shape=(count, count))
    _, clusters = connected_components(graph, directed=False)
    _, firsts = np.unique(clusters, return_index=True)
    return firsts[clusters].tolist()


class DuplicatePair(NamedTuple):
    """Training image and the most similar image of the reference set or of the other training images."""

    distance: float
    """Distance of the two images: 0 if equal, 1 if unrelated."""
    id: str
    """Id of the training record."""
    match: str
    """Id of the record of the most similar image."""
    open: Callable[[], Image.Image]
    """Function that returns the training image."""
    open_match: Callable[[], Image.Image]
    """Function that returns the most similar image."""


def pairs_with_reference(
    records: Iterable[Mapping[str, Any]],
    reference: Dataset | Sequence[Mapping[str, Any]],
    counts: Mapping[str, Counter[str]],
) -> Iterator[DuplicatePair]:
    """Yield each training image that resembles a reference image, together with the most similar one.

    Args:
        records: training records with an undecoded image and an id; they are read once, and may be streamed.
        reference: reference records with an undecoded image and an id.
        counts: counters by "train" and "reference", which are filled: images read, and unreadable ones by reason.
    """
    rows, ids, thumbnails = _read_all(reference, "reference", counts["reference"])
    index = DuplicateIndex(thumbnails, CROPS)
    for _, id, image in _read(records, "Comparing", counts["train"]):
        nearest = find_reference(thumbnail(image), index)
        if nearest is not None:
            match, distance = nearest
            preview = image.resize((PREVIEW_SIDE, PREVIEW_SIDE))  # a stream cannot be read again
            yield DuplicatePair(distance, id, ids[match], preview.copy, partial(_open_row, reference, rows[match]))


def pairs_within(records: Dataset, threshold: float, counts: Mapping[str, Counter[str]]) -> Iterator[DuplicatePair]:
    """Yield each image that duplicates an earlier one, with its nearest duplicate; then all pairs of larger distance.

    Args:
        records: training records with an undecoded image and an id.
        threshold: largest distance of a near-duplicate.
        counts: counter by "train", which is filled: images read, and unreadable ones by reason.
    """
    rows, ids, thumbnails = _read_all(records, "train", counts["train"])
    distances = find_within(DuplicateIndex(thumbnails, [FULL]))

    def pair(distance: float, first: int, second: int) -> DuplicatePair:
        open_first, open_second = (partial(_open_row, records, rows[index]) for index in (first, second))
        return DuplicatePair(distance, ids[first], ids[second], open_first, open_second)

    duplicates = [indices for indices, distance in distances.items() if distance <= threshold]
    nearest: dict[int, tuple[float, int]] = {}
    for earlier, later in duplicates:
        for one, other in ((earlier, later), (later, earlier)):
            nearest[one] = min((distances[earlier, later], other), nearest.get(one, (1.0, other)))
    for index, first in enumerate(cluster_duplicates(len(rows), duplicates)):
        if index != first:
            distance, other = nearest[index]
            yield pair(distance, index, other)
    for (earlier, later), distance in distances.items():
        if distance > threshold:
            yield pair(distance, later, earlier)


def _read_all(
    records: Any, name: str, counts: Counter[str]
) -> tuple[Sequence[int], Sequence[str], Sequence[Image.Image]]:
    """Return row number, id and thumbnail of each readable record, as three sequences."""
    images = _read(records, f"Reading images ({name})", counts)
    entries = [(row, id, thumbnail(image)) for row, id, image in images]
    if not entries:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no records"
        raise UserError(f"no image of the {name} data can be read ({reasons}): correct its path or files")
    rows, ids, thumbnails = zip(*entries, strict=True)
    return rows, ids, thumbnails


def _read(
    records: Iterable[Mapping[str, Any]], description: str, counts: Counter[str]
) -> Iterator[tuple[int, str, Image.Image]]:
    """Yield row number, id and image of each readable record; count the others by reason."""
    for row, record in enumerate(track(records, description)):
        try:
            image = decode_pil(record["image"])
        except UnreadableImage as error:
            counts[error.reason] += 1
            continue
        counts["read"] += 1
        yield row, record["id"], image


def _open_row(records: Any, row: int) -> Image.Image:
    return decode_pil(records[row]["image"])
