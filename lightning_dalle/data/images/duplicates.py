"""Search for near-duplicates: copies of an image that are rescaled, recompressed, cropped, or brighter or darker.

Images are compared by a descriptor of luminance gradients. An index of descriptors at 8x8 pixels, with 36 crops of each
image, returns candidates. Each candidate's crop is then aligned until the descriptors agree best at 32x32 pixels, where
those of different photos hardly agree. Gradients are used since photos of one kind, such as sky above ground, have
similar luminance. The descriptor's length is ignored: a change of brightness scales it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from lightning_dalle.progress import OnProgress, no_progress

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a crop, in pixels of a thumbnail."""

SIDE = 64
COARSE, FINE = 8, 32
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


class NearestImage(NamedTuple):
    """Nearest image of an index."""

    index: int
    """Index of the image."""
    distance: float
    """Distance to the image, as in `align_crop`."""


class CropMatch(NamedTuple):
    """Candidate for a near-duplicate: an image of an index, found by a crop of it or of the query."""

    index: int
    """Index of the image."""
    box: Box
    """Crop of the indexed image."""
    query_box: Box
    """Crop of the query."""


class DuplicateIndex:
    """Images that can be looked up by the gradient descriptors of their crops.

    The index is faiss's inverted file: a query is compared with the images in the 8 nearest cells. The number of cells
    is about the square root of the number of crops.

    Args:
        thumbnails: thumbnails of the images.
        crops: crops of each image that are indexed.
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

    def candidates(self, thumb: Image.Image, crops: Sequence[Box]) -> list[CropMatch]:
        """Return the images that are most similar to any crop of a query, most similar first."""
        queries = np.stack([gradient_descriptor(thumb, COARSE, box) for box in crops])
        # One more than needed: a query that is itself in the index finds itself.
        similarity, neighbors = self._index.search(queries, (NUM_CANDIDATES + 1) * len(self.crops))
        found: dict[int, CropMatch] = {}
        for query, rank in zip(*np.unravel_index(np.argsort(-similarity, axis=None), similarity.shape), strict=True):
            if similarity[query, rank] < MIN_SIMILARITY:
                break
            index, crop = divmod(int(neighbors[query, rank]), len(self.crops))
            found.setdefault(index, CropMatch(index, self.crops[crop], crops[query]))
        return list(found.values())


def find_reference(thumb: Image.Image, references: DuplicateIndex) -> NearestImage | None:
    """Return the reference image that a training image is most likely a copy of, or None without candidates.

    Args:
        thumb: thumbnail of the training image.
        references: index of the reference images by all `CROPS`.
    """
    candidates = references.candidates(thumb, [FULL])[:NUM_CANDIDATES]
    nearest = (NearestImage(i, align_crop(thumb, references.thumbnails[i], box)) for i, box, _ in candidates)
    return min(nearest, key=lambda image: image.distance, default=None)


def find_within(images: DuplicateIndex, on_progress: OnProgress = no_progress) -> dict[tuple[int, int], float]:
    """Return the distance of each pair of similar images, keyed by (earlier index, later index).

    Args:
        images: index of the images by the crop `FULL` alone.
        on_progress: called with the number of images compared and their total.
    """
    found: dict[tuple[int, int], float] = {}
    for original, thumb in enumerate(images.thumbnails):
        candidates = [candidate for candidate in images.candidates(thumb, CROPS) if candidate.index != original]
        for copy, _, box in candidates[:NUM_CANDIDATES]:
            pair = (min(original, copy), max(original, copy))
            found[pair] = min(align_crop(images.thumbnails[copy], thumb, box), found.get(pair, 1.0))
        on_progress(original + 1, len(images.thumbnails))
    return found


def cluster_duplicates(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return for each image the index of the first image in its cluster, which is its own without duplicates.

    Clusters follow chains of pairs, since an image with a hundred copies is paired with only some of them.

    Args:
        count: number of images.
        pairs: pairs of near-duplicates.
    """
    earlier, later = zip(*pairs, strict=True) if pairs else ((), ())
    graph = sparse.coo_array((np.ones(len(pairs)), (earlier, later)), shape=(count, count))
    _, clusters = connected_components(graph, directed=False)
    _, firsts = np.unique(clusters, return_index=True)
    return firsts[clusters].tolist()
