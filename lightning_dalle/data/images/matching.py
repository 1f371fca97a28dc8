"""Pairs of near-duplicate images among training records, or between training records and a reference set."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from PIL.Image import Image
from rich.progress import track

from lightning_dalle.data.images.decoding import UnreadableImage, decode_pil
from lightning_dalle.data.images.duplicates import (
    CROPS,
    FULL,
    DuplicateIndex,
    cluster_duplicates,
    find_reference,
    find_within,
    thumbnail,
)
from lightning_dalle.errors import UserError
from lightning_dalle.progress import progress_bar

PREVIEW_SIDE = 160
"""Side in pixels of the preview of a streamed image."""


class DuplicatePair(NamedTuple):
    """Training image and the image that it most resembles."""

    distance: float
    """Distance of the two images: 0 if equal, 1 if unrelated."""
    id: str
    """Id of the training record."""
    match: str
    """Id of the record that it resembles."""
    open: Callable[[], Image]
    """Function that returns the training image."""
    open_match: Callable[[], Image]
    """Function that returns the image that it resembles."""


class _Entry(NamedTuple):
    """Readable record of an index."""

    row: int
    id: str
    thumb: Image


def pairs_with_reference(
    records: Iterable[Mapping[str, Any]],
    reference: Dataset | Sequence[Mapping[str, Any]],
    counts: Mapping[str, Counter[str]],
) -> Iterator[DuplicatePair]:
    """Yield each training image that resembles a reference image, together with the most similar one.

    Args:
        records: training records with an undecoded image and an id; they are read once, and may be streamed.
        reference: reference records with an undecoded image and an id.
        counts: counters for "train" and "reference", of images that were read and of reasons for unreadable ones.
    """
    entries = _read_all(reference, "reference", counts["reference"])
    index = DuplicateIndex([entry.thumb for entry in entries], CROPS)
    for _, id, image in _read(records, "Comparing", counts["train"]):
        nearest = find_reference(thumbnail(image), index)
        if nearest is not None:
            original = entries[nearest.index]
            preview = image.resize((PREVIEW_SIDE, PREVIEW_SIDE))  # a stream cannot be read again
            yield DuplicatePair(
                nearest.distance, id, original.id, preview.copy, partial(_open_row, reference, original.row)
            )


def pairs_within(rows: Dataset, threshold: float, counts: Mapping[str, Counter[str]]) -> Iterator[DuplicatePair]:
    """Yield each image that duplicates an earlier one, with its nearest duplicate; then pairs above the threshold.

    Args:
        rows: training records with an undecoded image and an id.
        threshold: largest distance of a near-duplicate.
        counts: counter for "train", of images that were read and of reasons for unreadable ones.
    """
    entries = _read_all(rows, "train", counts["train"])
    with progress_bar("Comparing") as on_progress:
        distances = find_within(DuplicateIndex([entry.thumb for entry in entries], [FULL]), on_progress)

    def pair(distance: float, first: int, second: int) -> DuplicatePair:
        one, other = entries[first], entries[second]
        return DuplicatePair(
            distance, one.id, other.id, partial(_open_row, rows, one.row), partial(_open_row, rows, other.row)
        )

    duplicates = [indices for indices, distance in distances.items() if distance <= threshold]
    nearest: dict[int, tuple[float, int]] = {}
    for earlier, later in duplicates:
        for one, other in ((earlier, later), (later, earlier)):
            nearest[one] = min((distances[earlier, later], other), nearest.get(one, (1.0, other)))
    for index, first in enumerate(cluster_duplicates(len(entries), duplicates)):
        if index != first:
            distance, other = nearest[index]
            yield pair(distance, index, other)
    for (earlier, later), distance in distances.items():
        if distance > threshold:
            yield pair(distance, later, earlier)


def _read_all(records: Any, name: str, counts: Counter[str]) -> list[_Entry]:
    images = _read(records, f"Reading images ({name})", counts)
    entries = [_Entry(row, id, thumbnail(image)) for row, id, image in images]
    if not entries:
        raise UserError(
            f"cannot compare images: none of the {len(records)} images ({name}) can be read: {dict(counts)}"
        )
    return entries


def _read(
    records: Iterable[Mapping[str, Any]], description: str, counts: Counter[str]
) -> Iterator[tuple[int, str, Image]]:
    """Yield row, id and image of each readable record; count the others by reason."""
    total = len(records) if isinstance(records, Sized) else None
    for row, record in enumerate(track(records, description, total)):
        try:
            image = decode_pil(record["image"])
        except UnreadableImage as error:
            counts[error.reason] += 1
            continue
        counts["read"] += 1
        yield row, record["id"], image


def _open_row(records: Any, row: int) -> Image:
    return decode_pil(records[row]["image"])
