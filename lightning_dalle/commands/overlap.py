"""`data overlap`: training pictures that are near-duplicates of an evaluation set's, or of each other.

Knows where pictures come from, and what a person has to see before records are excluded.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dalle.commands.data import read_datamodule
from lightning_dalle.errors import UserError
from lightning_dalle.files import write_text
from lightning_dalle.provenance import commit

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from PIL.Image import Image

SHOWN = 24
"""Pairs on either side of the threshold that are on the sheet."""
SIDE = 160
"""Of a picture on the sheet, in pixels."""


def overlap(
    config: Path,
    out: Path,
    reference: str | None = None,
    reference_split: str = "validation",
    within: bool = False,
    threshold: float = 0.3,
    data: dict[str, Any] | None = None,
) -> None:
    """Find training pictures that are near-duplicates of a reference set's, or of each other.

    Writes excluded.tsv, the list that the filter lightning_dalle.data.filters.exclusions.Excluded honours, and borderline.png,
    the pairs nearest to the threshold on either side, to look at before the list is used.

    Args:
        config: of a fit, or the keys of its data alone.
        out: folder for what is written; it must not hold any of it.
        reference: pictures that must not be trained on: a folder of them, or a name or a folder that the source
            CaptionedPictures reads.
        reference_split: what the split of the reference is called, unless it is a folder of pictures.
        within: compare the training pictures with each other; of those that are the same the first stays.
        threshold: largest distance of a near-duplicate: 0 is the same picture, 1 has nothing in common. Copies of 330
            photos were within 0.11 of them, and different photos 0.51 apart.
        data: keys of the data to set otherwise, such as `--data.source.init_args.path my/pictures`.
    """
    if (reference is not None) == within:
        raise UserError("give either --reference or --within true, and not both")
    if not 0 < threshold < 1:
        raise UserError(f"threshold is {threshold}, but distances are from 0 to 1")
    files = [out / name for name in ("excluded.tsv", "borderline.png", "overlap.json")]
    taken = [file for file in (out, *files) if file.is_file()]
    if taken:
        raise UserError(f"{taken[0]} is there already; choose another --out than {out}")
    datamodule = read_datamodule(config, data or {})

    from lightning_dalle.data.filters.exclusions import Exclusion, write_exclusions
    from lightning_dalle.images import save

    rows = training_rows(datamodule.source.load(datamodule.image_size))
    borderline = Borderline(threshold)
    exclusions: dict[str, Exclusion] = {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    pairs = (
        with_each_other(rows, threshold, counts)
        if reference is None
        else with_reference(rows, reference_records(reference, reference_split), counts)
    )
    reason = f"near-duplicate of {'an earlier record' if reference is None else reference}"
    for pair in pairs:
        borderline.add(pair)
        if pair.distance <= threshold:
            exclusions[pair.id] = Exclusion(pair.id, reason, pair.match, pair.distance)
    out.mkdir(parents=True, exist_ok=True)
    doubtful_first = sorted(exclusions.values(), key=lambda exclusion: -exclusion.distance)
    write_exclusions(files[0], doubtful_first)
    if borderline.pairs():
        save(borderline.sheet(), files[1], None)
    result = {
        "config": str(config),
        "reference": reference,
        "threshold": threshold,
        "pictures": counts,
        "excluded": len(exclusions),
        "commit": commit(),
    }
    write_text(files[2], json.dumps(result, indent=2) + "\n")
    for side, counted in counts.items():
        print(f"{side}: {', '.join(f'{count} {what}' for what, count in counted.items())}")
    print(f"{len(exclusions)} near-duplicates in {files[0]}: look at {files[1]} before you exclude them")


class Pair(NamedTuple):
    """A training picture and what it is most like."""

    distance: float
    id: str
    match: str
    show: Callable[[], "Image"]
    show_match: Callable[[], "Image"]


class Borderline:
    """Of the pairs that come, those that are nearest to the threshold on either side.

    Args:
        threshold: the distance up to which a pair is of near-duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sides: dict[bool, list[tuple[float, int, Pair]]] = {True: [], False: []}
        self._seen = 0

    def add(self, pair: Pair) -> None:
        side = self._sides[pair.distance <= self.threshold]
        self._seen += 1
        heapq.heappush(side, (-abs(pair.distance - self.threshold), self._seen, pair))
        if len(side) > SHOWN:
            heapq.heappop(side)

    def pairs(self) -> list[Pair]:
        """From near to far."""
        return sorted((pair for side in self._sides.values() for *_, pair in side), key=lambda pair: pair.distance)

    def sheet(self) -> "Image":
        """The training picture on the left of each pair."""
        from lightning_dalle.images import captioned_grid

        pairs = self.pairs()
        verdicts = ["excluded" if pair.distance <= self.threshold else "kept" for pair in pairs]
        titles = [f"{p.distance:.3f} {v}: {p.id} ~ {p.match}" for p, v in zip(pairs, verdicts, strict=True)]
        return captioned_grid([[pair.show(), pair.show_match()] for pair in pairs], titles, columns=4, side=SIDE)


def training_rows(splits: Mapping[str, "Dataset | IterableDataset"]) -> "Dataset | IterableDataset":
    """The split train, undecoded.

    Raises:
        UserError: if there is none, or its records have no ids to exclude them by.
    """
    from datasets import Dataset
    from datasets import Image as EncodedImage

    if "train" not in splits:
        raise UserError(f"the data's split train is needed, but the source has {', '.join(splits)}")
    rows = splits["train"]
    if not isinstance(rows, Dataset):
        return rows
    if "id" not in rows.column_names:
        raise UserError(f"records are excluded by their column id, but the source has {', '.join(rows.column_names)}")
    return rows.cast_column("image", EncodedImage(decode=False))


class Seen(NamedTuple):
    """What is kept of a picture to compare it with others."""

    number: int
    """Of its record."""
    id: str
    thumb: "Image"


def with_reference(
    rows: "Dataset | IterableDataset", originals: Any, counts: dict[str, Counter[str]]
) -> Iterator[Pair]:
    """Each training picture that is like one of the reference, with that."""
    from datasets import Dataset

    from lightning_dalle.data.images.duplicates import CROPS, Lookalikes, find_reference, thumbnail
    from lightning_dalle.data.loading.streaming import Reader

    seen = look_at(originals, "reference", counts)
    known = Lookalikes([original.thumb for original in seen], CROPS)
    is_streamed = not isinstance(rows, Dataset)
    records = Reader(rows, 0, 1, None, 100).one_pass() if is_streamed else rows
    total = None if is_streamed else len(rows)
    for _, name, picture in read(records, total, "Comparing", counts["train"]):
        match = find_reference(thumbnail(picture), known)
        if match is not None:
            original = seen[match.number]
            small = picture.resize((SIDE, SIDE))  # kept, since a stream does not come back for the sheet
            yield Pair(match.distance, name, original.id, small.copy, partial(reopen, originals, original.number))


def with_each_other(
    rows: "Dataset | IterableDataset", threshold: float, counts: dict[str, Counter[str]]
) -> Iterator[Pair]:
    """Each training picture that an earlier one is the same as, with what it is nearest to; and the pairs that are
    alike, but not the same.
    """
    from datasets import Dataset

    from lightning_dalle.data.images.duplicates import WHOLE, Lookalikes, find_within, first_copies
    from lightning_dalle.progress import progress_bar

    if not isinstance(rows, Dataset):
        raise UserError("training pictures are to be compared with each other, but the data is streamed")
    seen = look_at(rows, "train", counts)
    known = Lookalikes([picture.thumb for picture in seen], [WHOLE])
    with progress_bar("Comparing") as on_progress:
        found = find_within(known, on_progress)

    def pair(distance: float, one: int, other: int) -> Pair:
        show, show_match = (partial(reopen, rows, seen[number].number) for number in (one, other))
        return Pair(distance, seen[one].id, seen[other].id, show, show_match)

    nearest: dict[int, tuple[float, int]] = {}
    same = []
    for (earlier, later), distance in found.items():
        if distance > threshold:
            yield pair(distance, later, earlier)
            continue
        same.append((earlier, later))
        for one, other in ((earlier, later), (later, earlier)):
            nearest[one] = min((distance, other), nearest.get(one, (distance, other)))
    for number, first in enumerate(first_copies(len(seen), same)):
        if number != first:
            distance, other = nearest[number]
            yield pair(distance, number, other)


def look_at(records: Any, whose: str, counts: dict[str, Counter[str]]) -> list[Seen]:
    """Thumbnails of all records.

    Raises:
        UserError: if none can be read.
    """
    from lightning_dalle.data.images.duplicates import thumbnail

    pictures = read(records, len(records), f"Reading pictures ({whose})", counts[whose])
    seen = [Seen(number, name, thumbnail(picture)) for number, name, picture in pictures]
    if not seen:
        raise UserError(f"none of the {len(records)} pictures ({whose}) can be read: {dict(counts[whose])}")
    return seen


def reference_records(reference: str, split: str) -> "Sequence[Mapping[str, Any]] | Dataset":
    """Pictures, undecoded, and their ids: those below a folder by their paths in it, or else of `CaptionedPictures`."""
    from lightning_dalle.data.sources.captioned import CaptionedPictures
    from lightning_dalle.evaluation.features import EXTENSIONS

    folder = Path(reference).expanduser()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    if paths:
        return [{"image": {"bytes": None, "path": str(path)}, "id": str(path.relative_to(folder))} for path in paths]
    from datasets import Image as EncodedImage

    splits = CaptionedPictures(path=reference, splits={split: split}).load(0)
    return splits[split].cast_column("image", EncodedImage(decode=False))


def read(
    records: Any, total: int | None, description: str, counted: Counter[str]
) -> Iterator[tuple[int, str, "Image"]]:
    """The number, the id and the picture of each record that can be read; the others are counted by reason."""
    from rich.progress import track

    from lightning_dalle.data.images.decoding import Unreadable, read_picture

    for number, record in enumerate(track(records, description, total)):
        try:
            picture = read_picture(record["image"])
        except Unreadable as error:
            counted[error.reason] += 1
            continue
        counted["read"] += 1
        yield number, record["id"], picture


def reopen(records: Any, number: int) -> "Image":
    """The picture of a record, for the sheet."""
    from lightning_dalle.data.images.decoding import read_picture

    return read_picture(records[number]["image"])
