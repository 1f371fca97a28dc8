"""What is kept of a record, and why the others are not: filters applied and their rejections counted.

Knows records and filters. Knows nothing of where records come from or what becomes of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets

from lightning_dalle.data.captions import LONGEST, caption_list
from lightning_dalle.data.filters.rules import (
    CaptionFilter,
    CaptionFlood,
    Filter,
    Floods,
    PictureFilter,
    RecordFilter,
    TooLong,
    count_captions,
)
from lightning_dalle.data.images.decoding import UNREACHABLE, Unreadable, picture_size, read_pixels
from lightning_dalle.files import file_fingerprint

Record = Mapping[str, Any]
"""At least `image`, undecoded: its "bytes" or "path", and `captions`, a list of texts."""

RECIPE = 1
"""Part of the name that verdicts are cached under: change what is kept with the same filters, change the number."""

_PAGE = TooLong(max_characters=LONGEST)

VERDICT = Features(captions=List(Value("string")), reason=Value("string"))

MANY = 10_000
"""Rows from which on it pays to start processes."""


@dataclass(frozen=True)
class Rejection:
    """A record that is not trained on."""

    reason: str


class Screened(NamedTuple):
    """What screening leaves of rows, and what it took."""

    kept: Dataset
    rejected: Counter[str]
    """How many, by reason."""
    examples: dict[str, str]
    """The first that was rejected for each reason, as `name_of` has it: where to look for what is wrong."""


class Screening:
    """Filters, and what no filter is needed for: a record without a caption or a readable picture is always rejected.

    Captions are judged before pictures and pictures before records, each in the order of the filters. A record with
    several captions keeps those that pass; if none does, it is rejected for what took the last.
    """

    def __init__(self, filters: Sequence[Filter] = ()) -> None:
        self.filters = filters
        # Told apart once: to ask a protocol takes longer than most filters do.
        self._of_captions = [judge for judge in (_PAGE, *filters) if isinstance(judge, CaptionFilter)]
        self._of_pictures = [judge for judge in filters if isinstance(judge, PictureFilter)]
        self._of_records = [judge for judge in filters if isinstance(judge, RecordFilter)]

    def screen(self, record: Record) -> Record | Rejection:
        """The record with the captions that are left, or why it is rejected; of its picture at most the header is read,
        where a filter asks for it.
        """
        captions = caption_list(record["captions"])
        if not captions:
            return Rejection("without a caption")
        for of_captions in self._of_captions:
            captions = [caption for caption in captions if not of_captions.rejects_caption(caption)]
            if not captions:
                return Rejection(of_captions.reason)
        if self._of_pictures:
            try:
                width, height = picture_size(record["image"])
            except Unreadable as error:
                return Rejection(error.reason)
            for of_pictures in self._of_pictures:
                if of_pictures.rejects_picture(width, height):
                    return Rejection(of_pictures.reason)
        for of_records in self._of_records:
            if of_records.rejects_record(record):
                return Rejection(of_records.reason)
        return {**record, "captions": captions}

    def screen_rows(self, rows: Dataset, workers: int = 0) -> Screened:
        """The rows that are kept, and by reason the number and the first of those rejected.

        Every picture that would be kept is decoded once, so that training meets none that it cannot read. The
        verdicts are cached beside the rows by the fingerprints of rows and filters, and by size and time of the files
        that rows name by their path. What the network failed to give is asked for again whenever rows are screened.

        Args:
            rows: with the columns image, undecoded, and captions.
            workers: processes that share the work where there is much of it.
        """
        told = self._told(rows)
        verdicts = rows.map(
            _verdict,
            fn_kwargs={"screening": told, "recipe": RECIPE, "stamp": file_fingerprint(_paths(rows))},
            remove_columns=rows.column_names,
            features=VERDICT,
            num_proc=workers if workers and len(rows) > MANY else None,
            desc="Screening",
        )
        reasons = verdicts["reason"][:]
        unreached = [index for index, reason in enumerate(reasons) if reason == UNREACHABLE]
        if unreached:
            again = Dataset.from_list([_verdict(row, told) for row in rows.select(unreached)], features=VERDICT)
            places = {index: len(rows) + i for i, index in enumerate(unreached)}
            order = [places.get(index, index) for index in range(len(rows))]
            verdicts = concatenate_datasets([verdicts, again]).select(order)
            reasons = verdicts["reason"][:]
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        first: dict[str, int] = {}
        for index, reason in enumerate(reasons):
            if reason is not None:
                first.setdefault(reason, index)
        examples = {reason: name_of(rows[index], index) for reason, index in first.items()}
        # Side by side: no picture is written again.
        screened = concatenate_datasets([rows.remove_columns("captions"), verdicts.select_columns("captions")], axis=1)
        rejected = Counter(reason for reason in reasons if reason is not None)
        return Screened(screened.select(kept), rejected, examples)

    def verdict(self, record: Record) -> Record | Rejection:
        """As `screen`, with the picture decoded to its end."""
        screened = self.screen(record)
        if not isinstance(screened, Rejection):
            try:
                read_pixels(record["image"])
            except Unreadable as error:
                return Rejection(error.reason)
        return screened

    def check_stream(self) -> None:
        """Looks for the files that streamed data need.

        Raises:
            UserError: if a filter has counts to be told by, but no file of them.
        """
        for judge in self.filters:
            if isinstance(judge, CaptionFlood):
                _ = judge.floods

    def _told(self, rows: Dataset) -> "Screening":
        """The same with the floods themselves in the place of who asks for them: those of a file, or else among these
        rows. The verdicts are cached by what the filters hold, and a file's name stays when its counts change.
        """
        counts: Counter[str] | None = None
        told: list[Filter] = []
        for judge in self.filters:
            if not isinstance(judge, CaptionFlood):
                told.append(judge)
            elif judge.file is not None:
                told.append(judge.floods)
            else:
                counts = count_captions(map(caption_list, rows["captions"])) if counts is None else counts
                told.append(Floods.of(counts, judge.max_count))
        return Screening(told)


def name_of(record: Record, place: int) -> str:
    """What a person finds a record by: its picture's file or URL, or else its id, or else its place in the split."""
    image = record["image"]
    if image is not None and image["bytes"] is None and image["path"]:
        return str(image["path"])
    return str(record.get("id") or place)


def _paths(rows: Dataset) -> list[str]:
    """Of the pictures that are files of their own; no bytes are read."""
    column = rows.data.column("image")
    is_file = pc.is_null(pc.struct_field(column, "bytes"))
    return [path for path in pc.struct_field(column, "path").filter(is_file).to_pylist() if path]


def _verdict(record: Record, screening: Screening, recipe: int = RECIPE, stamp: str = "") -> dict[str, Any]:
    """The captions that are left and no reason, or no captions and the reason."""
    verdict = screening.verdict(record)
    if isinstance(verdict, Rejection):
        return {"captions": [], "reason": verdict.reason}
    return {"captions": verdict["captions"], "reason": None}
