"""Near-duplicates: the same picture rescaled, recompressed, cropped or of another brightness.

Knows pictures by their slopes of luminance. Knows nothing of records, captions or files.

The slopes of a picture of 8x8 pixels find candidates, in an index that holds every picture cropped in 36 ways. A copy
of a candidate can then be laid over it: the crop is moved until the slopes agree best at 32x32 pixels, where those of
different photos hardly agree at all. Slopes rather than luminance, since photos of one kind (sky above ground) have
much the same luminance; a brightness that changes scales them, and their length is not compared.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a crop, in pixels of a thumbnail."""

SIDE = 64
COARSE, FINE = 8, 32
_PLACES = [(first / 20, 1 - last / 20) for first in range(3) for last in range(3 - first)]
"""What is left of a side when up to a tenth of it is cut off, in steps of a twentieth."""
WHOLE: Box = (0.0, 0.0, float(SIDE), float(SIDE))
CROPS: list[Box] = [
    (SIDE * left, SIDE * top, SIDE * right, SIDE * bottom)
    for (left, right), (top, bottom) in itertools.product(_PLACES, _PLACES)
]

CANDIDATES = 3
"""Pictures that a picture is laid over, at most."""
LEAST_LIKENESS = 0.6
"""Of a candidate, at 8x8 pixels. Copies of photos have 0.92 and more; of other pairs, 1 in 1,000 has 0.65."""


def thumbnail(picture: Image.Image) -> Image.Image:
    """All that is kept of a picture: its luminance at 64x64 pixels."""
    return picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)


def slopes(thumb: Image.Image, side: int, box: Box = WHOLE) -> Float[np.ndarray, " d"]:
    """Differences of neighbours in a crop of side by side pixels, as a vector of length 1; shorter where the picture is
    so plain that what differs is noise, which makes it like nothing.
    """
    pixels = np.asarray(thumb.resize((side, side), Image.Resampling.BILINEAR, box), np.float32)
    differences = np.concatenate([np.diff(pixels, axis=axis).ravel() for axis in (0, 1)])
    return differences / max(float(np.linalg.norm(differences)), math.sqrt(differences.size))


def lay_over(copy: Image.Image, original: Image.Image, box: Box) -> float:
    """Distance of one thumbnail to the crop of another that is most like it: 0 for the same, 1 for nothing in common.

    Args:
        copy: compared as a whole.
        original: of which a crop is compared.
        box: the crop to begin from; its edges move by a fortieth of the side, then by less, while that helps.
    """
    wanted = slopes(copy, FINE)
    best = float(slopes(original, FINE, box) @ wanted)
    for step in (SIDE / 40, SIDE / 80, SIDE / 160):
        moved = True
        while moved:
            moved = False
            for edge, by in itertools.product(range(4), (-step, step)):
                edges = [place + by * (i == edge) for i, place in enumerate(box)]
                if min(edges) < 0 or max(edges) > SIDE or min(edges[2] - edges[0], edges[3] - edges[1]) < SIDE / 2:
                    continue
                nearer: Box = (edges[0], edges[1], edges[2], edges[3])
                likeness = float(slopes(original, FINE, nearer) @ wanted)
                if likeness > best:
                    best, box, moved = likeness, nearer, True
    return 1 - best


class Match(NamedTuple):
    """The nearest of some pictures."""

    number: int
    """Which of them."""
    distance: float


class Candidate(NamedTuple):
    """A picture that might be the same, by a crop of either."""

    number: int
    box: Box
    """Its crop."""
    query_box: Box
    """The crop of the picture that is looked up."""


class Lookalikes:
    """Pictures that are found by what they look like.

    The index is faiss's inverted file: what is looked up is compared with the pictures of the nearest 8 cells of some
    that they fall into, as many as the root of their number.

    Args:
        thumbnails: of the pictures.
        crops: of each, by which it is found.
    """

    def __init__(self, thumbnails: Sequence[Image.Image], crops: Sequence[Box]) -> None:
        self.thumbnails, self.crops = thumbnails, crops
        known = np.stack([slopes(thumb, COARSE, box) for thumb in thumbnails for box in crops])
        # faiss wants 39 points to place the middle of a cell by.
        cells = max(1, min(math.isqrt(len(known)), len(known) // 39))
        self._index = faiss.index_factory(known.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        faiss.ParameterSpace().set_index_parameter(self._index, "nprobe", 8)
        self._index.train(known)
        self._index.add(known)

    def candidates(self, thumb: Image.Image, crops: Sequence[Box]) -> list[Candidate]:
        """The pictures that are most like any of a picture's crops, likest first."""
        queries = np.stack([slopes(thumb, COARSE, box) for box in crops])
        # One more than are wanted: a picture that is in the index itself finds itself.
        likeness, places = self._index.search(queries, (CANDIDATES + 1) * len(self.crops))
        found: dict[int, Candidate] = {}
        for query, rank in zip(*np.unravel_index(np.argsort(-likeness, axis=None), likeness.shape), strict=True):
            if likeness[query, rank] < LEAST_LIKENESS:
                break
            number, crop = divmod(int(places[query, rank]), len(self.crops))
            found.setdefault(number, Candidate(number, self.crops[crop], crops[query]))
        return list(found.values())


def find_reference(thumb: Image.Image, references: Lookalikes) -> Match | None:
    """The reference picture that this one is nearest to a copy of, if it is like any.

    Args:
        thumb: of a training picture.
        references: of all `CROPS`.
    """
    candidates = references.candidates(thumb, [WHOLE])[:CANDIDATES]
    matches = (Match(i, lay_over(thumb, references.thumbnails[i], box)) for i, box, _ in candidates)
    return min(matches, key=lambda match: match.distance, default=None)


def find_within(
    pictures: Lookalikes, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[tuple[int, int], float]:
    """Pairs of pictures that are like each other, the earlier first, and the distance by which one is a crop of the
    other.

    Args:
        pictures: whole.
        on_progress: told how many pictures of how many are done.
    """
    found: dict[tuple[int, int], float] = {}
    for original, thumb in enumerate(pictures.thumbnails):
        candidates = [candidate for candidate in pictures.candidates(thumb, CROPS) if candidate.number != original]
        for copy, _, box in candidates[:CANDIDATES]:
            pair = (min(original, copy), max(original, copy))
            found[pair] = min(lay_over(pictures.thumbnails[copy], thumb, box), found.get(pair, 1.0))
        on_progress(original + 1, len(pictures.thumbnails))
    return found


def first_copies(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Of each picture the first that is the same, by a pair or by a chain of them; itself where there is none.

    By chains, since a picture that is there a hundred times finds only some of the others.

    Args:
        count: of the pictures.
        pairs: of pictures that are the same.
    """
    earlier, later = zip(*pairs, strict=True) if pairs else ((), ())
    graph = sparse.coo_array((np.ones(len(pairs)), (earlier, later)), shape=(count, count))
    _, groups = connected_components(graph, directed=False)
    _, firsts = np.unique(groups, return_index=True)
    return firsts[groups].tolist()
