"""Captioned pictures of any form: a name on the Hugging Face hub, a local folder or file, URLs of tars.

Knows columns and splits. Knows nothing of models, tensors or training.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, concatenate_datasets

from lightning_dalle.data.captions import caption_list
from lightning_dalle.data.loading.streaming import CHUNK
from lightning_dalle.data.sources import formats
from lightning_dalle.data.sources.columns import PICTURE, RECORD, TEXTS, Columns, fields_of
from lightning_dalle.errors import UserError
from lightning_dalle.files import file_fingerprint

log = logging.getLogger(__name__)

Read = Callable[[str], Iterator[dict[str, Any]]]
"""Rows of a file."""

VAL_SPLITS = ("validation", "val", "valid", "test")
VAL_SHARE = 20
"""One record in so many is `val` where the data has no such split."""


@dataclass(frozen=True, kw_only=True)
class CaptionedPictures:
    """Source of captioned pictures, by `datasets`; the form is found by looking."""

    path: str
    """A name on the hub ("org/name"); a local folder with images beside a metadata.jsonl, with pictures beside texts of
    the same name (a caption on each line), with tables (parquet, CSV, TSV, JSON lines) or with WebDataset tars; one
    such table or tar; or the URL of tars ("https://host/{00000..00099}.tar"). What is local goes before the hub."""
    image: str | None = None
    """Column of the picture, encoded or the path of a file, from the folder on; if not given, the first there is of
    image, jpg, jpeg, png, webp, file_name, filename, image_path, filepath and path, in whatever case."""
    captions: str | None = None
    """Column of the captions: a list of them, or one text with a caption on each line. "json.captions" is the field
    `captions` of the column `json`. If not given, the first there is of captions, caption, json.captions, json.caption,
    sentences, description, text, txt and title."""
    id: str | None = None
    """Column of what a picture is called by; if not given, the first there is of image_id, cocoid, json.image_id,
    json.cocoid, id and the name in a tar, or else the row's number, or a hash of the picture where it is streamed."""
    splits: dict[str, str] | None = None
    """Our splits by name, each with the data's name of it. If not given, `train` is train and `val` is the first there
    is of validation, val, valid and test; where there is none of them, `val` is 5 % of train, by a hash of the id."""
    streamed: bool = False
    """Whether to read on the way, rather than copy to a cache and shuffle whole: for what is larger than a disk."""

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """The splits, with the columns image, captions and id; pictures as they come, whatever the size.

        Raises:
            UserError: if the data cannot be opened, or lacks a split or a column.
        """
        found = self._open()
        splits = self.splits
        if splits is None:
            of_val = next((name for name in VAL_SPLITS if name in found), None)
            splits = {"train": "train"} if "train" in found else {}
            splits |= {"val": of_val} if of_val else {}
        missing = sorted(set(splits.values()) - set(found))
        if missing or not splits:
            raise UserError(
                f"the source's splits are to be {', '.join(missing) or 'train or val'}, but {self.path} has "
                f"{', '.join(found)}"
            )
        named = {ours: self._records(found[theirs]) for ours, theirs in splits.items()}
        if self.splits is None and list(named) == ["train"]:
            named = self._part(named["train"])
        return IterableDatasetDict(named) if self.streamed else DatasetDict(named)

    def _open(self) -> Mapping[str, Any]:
        """Rows by split, as they are found; those that we read ourselves are records already."""
        form, found = formats.find(self.path)
        try:
            if form == "hub":
                found = formats.hub_tars(self.path)
                form = "tars" if found else form
            if form == "tars":
                return {split: self._from_rows(formats.samples, urls) for split, urls in found.items()}
            if form == ".jsonl" and self.streamed:  # the library's reader stops at a broken line, in mid-epoch
                return {split: self._from_rows(formats.lines, paths) for split, paths in found.items()}
            if form == "pairs":
                return {split: self._from_pairs(pictures) for split, pictures in found.items()}
            return formats.open_table(form, self.path, found, self.streamed)
        except UserError:
            raise
        except Exception as error:  # the library raises anything, from its own errors to those of the file formats
            if isinstance(error.__cause__, UserError):  # of our own generators
                raise error.__cause__ from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            kind = "no local folder or file, and the hub's" if form == "hub" else f"local, as {form}"
            raise UserError(f"the captioned pictures cannot be read from {self.path} ({kind}): {reason}") from error

    def _from_rows(self, read: Read, urls: list[str]) -> Dataset | IterableDataset:
        first = list(islice(read(urls[0]), 5))
        fields: dict[str, dict[str, None]] = {}
        for row in first:  # all together, since the JSON of one may be broken
            for name, value in row.items():
                fields.setdefault(name, {}).update(dict.fromkeys(fields_of(value)))
        columns = self._columns(fields)
        return self._generated(_read_records, {"urls": urls}, {"read": read, "columns": columns}, urls)

    def _from_pairs(self, pictures: list[str]) -> Dataset | IterableDataset:
        size = formats.PAIRS_IN_A_SHARD
        groups = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        texts = [str(formats.text_of(Path(picture))) for picture in pictures]
        return self._generated(_pair_records, {"groups": groups}, {"root": self._root()}, [*pictures, *texts])

    def _generated(
        self, generate: Any, shards: dict[str, Any], options: dict[str, Any], depends_on: list[str]
    ) -> Dataset | IterableDataset:
        if self.streamed:
            return IterableDataset.from_generator(partial(generate, **options), features=RECORD, gen_kwargs=shards)
        arguments = {**shards, **options, "stamp": file_fingerprint(depends_on)}
        return Dataset.from_generator(generate, features=RECORD, gen_kwargs=arguments)

    def _root(self) -> Path:
        """That paths are relative to."""
        path = Path(self.path).expanduser()
        return path.parent if path.is_file() else path

    def _columns(self, fields: Mapping[str, Iterable[str]]) -> Columns:
        wanted = {"image": self.image, "captions": self.captions, "id": self.id}
        return Columns.choose(fields, wanted, self._root(), self.path)

    def _records(self, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        if rows.features == RECORD:
            return rows if self.streamed else rows.cast_column("image", Image())
        if rows.features is None:  # of streamed CSV and the like, where only the rows tell
            rows = rows._resolve_features()
        columns = self._columns({name: fields_of(feature) for name, feature in rows.features.items()})
        columns.check_types(rows.features, self.path)
        for name, feature in rows.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
        if isinstance(rows, IterableDataset):
            theirs = rows.column_names
            return rows.map(columns.records, batched=True, batch_size=CHUNK, remove_columns=theirs, features=RECORD)
        return self._side_by_side(rows, columns)

    def _side_by_side(self, rows: Dataset, columns: Columns) -> Dataset:
        """Captions and ids beside the pictures as they are: no picture is written again."""
        picture, _ = columns.image
        if isinstance(rows.features[picture], Image):
            images = rows.select_columns(picture).rename_columns({picture: "image"})
        else:
            images = rows.map(columns.picture, remove_columns=rows.column_names, features=PICTURE)
        of_texts = {place[0] for place in (columns.captions, columns.id) if place}
        texts = rows.select_columns(sorted(of_texts))
        texts = texts.map(columns.texts, with_indices=True, remove_columns=texts.column_names, features=TEXTS)
        return concatenate_datasets([images.cast_column("image", Image()), texts], axis=1)

    def _part(self, rows: Any) -> dict[str, Any]:
        """Without a split of its own, `val` is what a hash of the id says, the same on every machine."""
        if isinstance(rows, IterableDataset):
            return {split: rows.filter(partial(_is_of, split), input_columns="id") for split in ("train", "val")}
        ids = rows["id"][:]
        of_val = [i for i, id in enumerate(ids) if _is_of("val", id)] or [ids.index(min(ids, key=_hash))]
        of_train = sorted(set(range(len(ids))) - set(of_val))
        log.warning("%s has no split for val: %d of its %d records are", self.path, len(of_val), len(ids))
        return {"train": rows.select(of_train), "val": rows.select(of_val)}


def complete(rows: Dataset, origin: str) -> tuple[Dataset, Counter[str]]:
    """Rows with a picture and a caption; the others are logged, and their counts by reason returned.

    Raises:
        UserError: if there is none.
    """
    skipped: Counter[str] = Counter()
    kept = []
    for i, (is_there, captions) in enumerate(zip(_has_picture(rows), rows["captions"], strict=True)):
        if not is_there:
            skipped["without a picture"] += 1
        elif not captions:
            skipped["without a caption"] += 1
        else:
            kept.append(i)
    if not skipped:
        return rows, skipped
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    log.warning("%s: passed over %s, of %d records", origin, counts, len(rows))
    if not kept:
        raise UserError(f"{origin} has no captioned picture among {len(rows)} records: {counts}")
    return rows.select(kept), skipped


def _read_records(urls: list[str], read: Read, columns: Columns, stamp: str = "") -> Iterator[dict[str, Any]]:
    for url in urls:
        yield from map(columns.record, read(url))


def _pair_records(groups: list[list[str]], root: Path, stamp: str = "") -> Iterator[dict[str, Any]]:
    for group in groups:
        for row in formats.pairs(group, root):
            yield {**row, "captions": caption_list(row["captions"])}


def _is_of(split: str, id: str) -> bool:
    return (_hash(id) % VAL_SHARE == 0) == (split == "val")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _has_picture(rows: Dataset) -> list[bool]:
    """Of each record, whether its picture has bytes or a file; no bytes are read."""
    column = rows.select_columns("image").cast_column("image", Image(decode=False)).with_format("arrow")[:]["image"]
    has_bytes = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [there or (path is not None and Path(path).is_file()) for there, path in zip(has_bytes, paths, strict=True)]
