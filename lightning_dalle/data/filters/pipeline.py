"""Pipeline that applies filters to single records and to whole splits, and counts rejections by reason."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets

from lightning_dalle.data.captions import MAX_CAPTION_CHARACTERS, caption_list
from lightning_dalle.data.filters import rules
from lightning_dalle.data.images.decoding import UNREACHABLE_IMAGE, UnreadableImage, decode_image, stored_size
from lightning_dalle.files import file_fingerprint

Record = Mapping[str, Any]
"""Record with an undecoded `image`, as a dict with "bytes" or "path", and `captions`, a list of texts."""

CACHE_VERSION = 2
"""Version of the filters in the cache key of their decisions. Increase it when a filter decides differently."""

DECISION = Features(captions=List(Value("string")), reason=Value("string"))
MIN_ROWS_FOR_WORKERS = 10_000
"""Fewest rows for which starting worker processes saves time."""


@dataclass(frozen=True)
class Rejection:
    """Decision that a record is not used for training."""

    reason: str


class FilterResult(NamedTuple):
    """Rows of a split that passed the filters, and counts of the rejected rows."""

    kept: Dataset
    rejected: Counter[str]
    """Number of rejected records by reason."""
    examples: dict[str, str]
    """File, URL, id or index of the first rejected record by reason."""


class FilterPipeline:
    """Sequence of filters: first those of captions, then those of images, then those of whole records.

    A record without a caption or a readable image is always rejected. A record with several captions keeps those that
    pass. If none passes, the record is rejected for the reason of the filter that rejected the last caption.
    """

    def __init__(self, filters: Sequence[rules.Filter] = ()) -> None:
        self.filters = filters
        # Grouped once, because isinstance with a protocol takes longer than most filters do.
        length = rules.TooLong(max_characters=MAX_CAPTION_CHARACTERS)
        self._caption_filters = [found for found in (length, *filters) if isinstance(found, rules.CaptionFilter)]
        self._image_filters = [found for found in filters if isinstance(found, rules.ImageFilter)]
        self._record_filters = [found for found in filters if isinstance(found, rules.RecordFilter)]

    def check(self, record: Record, decode: bool = False) -> Record | Rejection:
        """Return the record with the captions that pass, or its rejection.

        Image filters only read the header of an image. If `decode` is true, images that cannot be decoded are rejected.
        """
        captions = caption_list(record["captions"])
        if not captions:
            return Rejection("missing caption")
        for caption_filter in self._caption_filters:
            captions = [caption for caption in captions if not caption_filter.rejects_caption(caption)]
            if not captions:
                return Rejection(caption_filter.reason)
        try:
            if self._image_filters:
                width, height = stored_size(record["image"])
                for image_filter in self._image_filters:
                    if image_filter.rejects_image(width, height):
                        return Rejection(image_filter.reason)
            for record_filter in self._record_filters:
                if record_filter.rejects_record(record):
                    return Rejection(record_filter.reason)
            if decode:
                decode_image(record["image"])
        except UnreadableImage as error:
            return Rejection(error.reason)
        return {**record, "captions": captions}

    def filter_rows(self, rows: Dataset, num_workers: int = 0) -> FilterResult:
        """Filter the rows of a split, and reject images that cannot be decoded.

        Decisions are cached. The cache key contains the rows, the filters, and size and modification time of image
        files. Images whose URL failed are requested again in every call. Large splits use `num_workers` processes.
        """
        pipeline, column = self._resolved(rows), rows.data.column("image")
        is_file = pc.is_null(pc.struct_field(column, "bytes"))
        files = [path for path in pc.struct_field(column, "path").filter(is_file).to_pylist() if path]
        decisions = rows.map(
            _decide,
            fn_kwargs={"pipeline": pipeline, "version": CACHE_VERSION, "files": file_fingerprint(files)},
            remove_columns=rows.column_names,
            features=DECISION,
            num_proc=num_workers if num_workers and len(rows) > MIN_ROWS_FOR_WORKERS else None,
            desc="Filtering",
        )
        reasons = decisions["reason"][:]
        unreached = [index for index, reason in enumerate(reasons) if reason == UNREACHABLE_IMAGE]
        if unreached:
            again = Dataset.from_list([_decide(row, pipeline) for row in rows.select(unreached)], features=DECISION)
            replacement = {index: len(rows) + i for i, index in enumerate(unreached)}
            order = [replacement.get(index, index) for index in range(len(rows))]
            decisions = concatenate_datasets([decisions, again]).select(order)
            reasons = decisions["reason"][:]
        rejected = Counter(reason for reason in reasons if reason is not None)
        first = {reason: reasons.index(reason) for reason in rejected}
        examples = {reason: record_name(rows[index], index) for reason, index in first.items()}
        # Joining columns does not copy the images.
        joined = concatenate_datasets([rows.remove_columns("captions"), decisions.select_columns("captions")], axis=1)
        kept = joined.select([index for index, reason in enumerate(reasons) if reason is None])
        return FilterResult(kept, rejected, examples)

    def require_caption_counts(self) -> None:
        """Raise a UserError if a filter DuplicateCaptions has no caption counts; streamed data needs a file of them."""
        for found in self.filters:
            if isinstance(found, rules.DuplicateCaptions):
                _ = found.counts

    def _resolved(self, rows: Dataset) -> "FilterPipeline":
        filters = list(self.filters)
        for i, found in enumerate(filters):
            if isinstance(found, rules.DuplicateCaptions) and found.file is None:
                filters[i] = found.counted(map(caption_list, rows["captions"]))
        pipeline = FilterPipeline(filters)
        pipeline.require_caption_counts()  # adds the counts to the cache key: the file may change but keep its name
        return pipeline


def record_name(record: Record, index: int) -> str:
    """Return the file or URL of a record's image, or else the record's id, or else its index, for messages."""
    image = record["image"]
    if image is not None and image["bytes"] is None and image["path"]:
        return str(image["path"])
    return str(record.get("id") or index)


def _decide(record: Record, pipeline: FilterPipeline, version: int = CACHE_VERSION, files: str = "") -> dict[str, Any]:
    # `version` and `files` only enter the cache key.
    checked = pipeline.check(record, decode=True)
    if isinstance(checked, Rejection):
        return {"captions": [], "reason": checked.reason}
    return {"captions": checked["captions"], "reason": None}
