"""Captioned images of any format: Hugging Face datasets, a local folder or file, or URLs of tars."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, concatenate_datasets

from lightning_dalle.data.loading.streaming import CHUNK_SIZE
from lightning_dalle.data.sources import formats
from lightning_dalle.data.sources.columns import RECORD, Columns, fields_of
from lightning_dalle.data.sources.source import source_name, stable_hash
from lightning_dalle.errors import UserError
from lightning_dalle.files import file_fingerprint

log = logging.getLogger(__name__)

Read = Callable[[Any], Iterator[dict[str, Any]]]
"""Function that yields the rows of one shard, which is a file, a URL or a list of images."""

VAL_SPLITS = ("validation", "val", "valid", "test")
VAL_DIVISOR = 20
"""Reciprocal of the fraction of records that become `val`, if the data has no such split."""
PAIRS_PER_SHARD = 1000
MAX_SHARDS = 64
"""Number of shards into which streaming divides rows on disk, for that many workers."""


@dataclass(frozen=True, kw_only=True)
class CaptionedImages:
    """Source of captioned images; the format is detected."""

    path: str | Dataset | DatasetDict | IterableDataset | IterableDatasetDict
    """Path of the data. A local folder may have images and a metadata.jsonl, images and text files of the same name (a
    caption per line), tables (parquet, CSV, TSV, JSON lines), WebDataset tars, or files of `save_to_disk`. A path may
    also be one such table or tar, a URL of tars ("https://host/{00000..00099}.tar"), or a name on the hub ("org/name").
    Local paths have precedence over the hub. In Python it may be an object of `datasets`, whose format is ignored."""
    name: str | None = None
    """Name of the configuration of a hub dataset, as in `load_dataset`."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset. Default: its main branch."""
    image: str | None = None
    """Column of the image, encoded or as a path relative to the folder. Default: the first existing one of image, jpg,
    jpeg, png, webp, file_name, filename, image_path, filepath and path, ignoring case."""
    captions: str | None = None
    """Column of the captions: a list, or text with a caption per line. "json.captions" is the field `captions` of the
    column `json`. Default: the first existing one of captions, caption, json.captions, json.caption, sentences,
    description, text, txt and title."""
    id: str | None = None
    """Column of the record's id. Default: the first existing one of image_id, cocoid, json.image_id, json.cocoid, id
    and the name in a tar. Without any, the id is the row number or, if streamed, a hash of the image."""
    splits: dict[str, str] | None = None
    """Name in the data of each split, such as {"val": "dev"}. Default: `train` is train, and `val` is the first
    existing one of validation, val, valid and test. If none exists, `val` is 5 % of train by a hash of the id."""
    streaming: bool = False
    """Whether to read records during training, for data larger than a disk, instead of copying and shuffling all.
    An `IterableDataset` is always streamed."""

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"path": source_name(self)}
        return f"CaptionedImages({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """Return splits with the columns image (at its original size), captions and id.

        Raises:
            UserError: if the data cannot be opened, or lacks a split or a column.
        """
        found, are_records = self._open()
        splits = self.splits
        if splits is None:
            named = {"train": "train", "val": next((name for name in VAL_SPLITS if name in found), "val")}
            splits = {ours: theirs for ours, theirs in named.items() if theirs in found}
        missing = sorted(set(splits.values()) - set(found))
        if missing or not splits:
            raise UserError(
                f"{source_name(self)} has no split {', '.join(missing) or 'train or val'}; map train and val in "
                f"`splits` to some of {', '.join(found)}"
            )
        loaded = {ours: found[theirs] for ours, theirs in splits.items()}
        if not are_records:
            loaded = {split: self._records(rows) for split, rows in loaded.items()}
        if self.splits is None and list(loaded) == ["train"]:
            loaded = self._split_off_val(loaded["train"])
        is_streamed = any(isinstance(rows, IterableDataset) for rows in loaded.values())
        return IterableDatasetDict(loaded) if is_streamed else DatasetDict(loaded)

    def _open(self) -> tuple[Mapping[str, Any], bool]:
        """Return rows by split, and whether they are already records, as those of our own readers are."""
        format, found = formats.detect_format(self.path) if isinstance(self.path, str) else ("object", self.path)
        hub = {"name": self.name, "revision": self.revision}
        if format != "hub" and any(hub.values()):
            raise UserError(
                f"{source_name(self)} is not on the hub, but the source has name={self.name!r} and revision="
                f"{self.revision!r}; remove both, or set `path` to a dataset of the hub"
            )
        try:
            if format == "hub":
                found = formats.hub_tars(self.path, **hub)
                format = "tars" if found else format
            if format == "tars":
                return {split: self._read_files(formats.read_tar, urls) for split, urls in found.items()}, True
            if format == ".jsonl" and self.streaming:  # the reader of `datasets` stops at an invalid line
                return {split: self._read_files(formats.read_json_lines, paths) for split, paths in found.items()}, True
            if format == "pairs":
                return {split: self._read_pairs(images) for split, images in found.items()}, True
            if format != "object":
                found = formats.open_dataset(format, self.path, found, self.streaming, **hub)
            return found if isinstance(found, dict) else {"train": found}, False
        except UserError:
            raise
        except Exception as error:  # `datasets` and the readers of file formats raise exceptions of any type
            if isinstance(error.__cause__, UserError):  # raised in a generator of ours
                raise error.__cause__ from error
            reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
            kind, wrong = f"local, format {format}", "path or files"
            if format == "hub":
                kind, wrong = "neither a local path nor a readable hub dataset", "path, name or revision"
            raise UserError(f"cannot read {self.path} ({kind}), correct its {wrong}: {reason}") from error

    def _read_files(self, read: Read, files: list[str]) -> Dataset | IterableDataset:
        fields: dict[str, dict[str, None]] = {}
        for row in islice(read(files[0]), 5):  # several, since the JSON of the first may be invalid
            for name, value in row.items():
                fields.setdefault(name, {}).update(dict.fromkeys(fields_of(value)))
        return self._generate(read, files, self._columns(fields), files)

    def _read_pairs(self, images: list[str]) -> Dataset | IterableDataset:
        shards = [images[start : start + PAIRS_PER_SHARD] for start in range(0, len(images), PAIRS_PER_SHARD)]
        columns = Columns(("image", ""), ("captions", ""), ("id", ""), self._root)
        files = [*images, *(str(formats.caption_file(image)) for image in images)]
        return self._generate(partial(formats.read_pairs, root=self._root), shards, columns, files)

    def _generate(self, read: Read, shards: list[Any], columns: Columns, files: list[str]) -> Dataset | IterableDataset:
        """Return the records that a reader yields; without streaming they are cached until one of the files changes."""
        if self.streaming:
            generate = partial(_read_records, read=read, columns=columns)
            return IterableDataset.from_generator(generate, features=RECORD, gen_kwargs={"shards": shards})
        arguments = {"shards": shards, "read": read, "columns": columns, "fingerprint": file_fingerprint(files)}
        rows = Dataset.from_generator(_read_records, features=RECORD, gen_kwargs=arguments)
        return rows.cast_column("image", Image())

    @property
    def _root(self) -> Path:
        path = Path(self.path if isinstance(self.path, str) else "").expanduser()
        return path.parent if path.is_file() else path

    def _columns(self, fields: Mapping[str, Iterable[str]]) -> Columns:
        wanted = {"image": self.image, "captions": self.captions, "id": self.id}
        return Columns.choose(fields, wanted, self._root, source_name(self))

    def _records(self, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        rows = rows.with_format(None)
        if isinstance(rows, Dataset) and not rows:
            raise UserError(f"a split of {source_name(self)} has no records; name others in `splits`")
        if self.streaming and isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset(min(len(rows), MAX_SHARDS))
        if rows.features is None:  # streamed CSV, for example, whose columns only the rows reveal
            rows = rows.cast(Dataset.from_list(list(rows.take(5))).features)
        columns = self._columns({name: fields_of(feature) for name, feature in rows.features.items()})
        columns.check_types(rows.features, source_name(self))
        for name, feature in rows.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
        if isinstance(rows, IterableDataset):
            names = rows.column_names
            return rows.map(columns.records, batched=True, batch_size=CHUNK_SIZE, remove_columns=names, features=RECORD)
        image_column, _ = columns.image
        images = None
        if isinstance(rows.features[image_column], Image):  # joined with the other columns below instead of copied
            images = rows.select_columns(image_column).rename_columns({image_column: "image"})
            rows = rows.select_columns(sorted({place[0] for place in (columns.captions, columns.id) if place}))
        records = rows.map(columns.record, with_indices=True, remove_columns=rows.column_names, features=RECORD)
        if images is not None:
            records = concatenate_datasets([images, records.remove_columns("image")], axis=1)
        return records.cast_column("image", Image())

    def _split_off_val(self, rows: Any) -> dict[str, Any]:
        """Split rows into train and val by a hash of the id, equal on every machine."""
        if isinstance(rows, IterableDataset):
            return {split: rows.filter(partial(_is_in, split), input_columns="id") for split in ("train", "val")}
        ids = rows["id"][:]
        val = [i for i, id in enumerate(ids) if _is_in("val", id)] or [ids.index(min(ids, key=stable_hash))]
        train = sorted(set(range(len(ids))) - set(val))
        log.warning("%s has no split val: %d of its %d records are used", source_name(self), len(val), len(ids))
        return {"train": rows.select(train), "val": rows.select(val)}


def drop_incomplete(rows: Dataset, origin: str) -> tuple[Dataset, Counter[str]]:
    """Return the rows that have an image and a caption, and the numbers of dropped rows by reason, which are logged.

    Raises:
        UserError: if no row is left.
    """
    reasons = [
        "missing image" if not has_image else "" if captions else "missing caption"
        for has_image, captions in zip(_have_image(rows), rows["captions"], strict=True)
    ]
    skipped, kept = Counter(filter(None, reasons)), [i for i, reason in enumerate(reasons) if not reason]
    if not skipped:
        return rows, skipped
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    log.warning("%s: skipped %s, of %d records", origin, counts, len(rows))
    if not kept:
        raise UserError(
            f"none of {len(rows)} records of {origin} has image and caption ({counts}); correct `image` or `captions`"
        )
    return rows.select(kept), skipped


def _read_records(shards: list[Any], read: Read, columns: Columns, fingerprint: str = "") -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from map(columns.record, read(shard))


def _is_in(split: str, id: str) -> bool:
    return (stable_hash(id) % VAL_DIVISOR == 0) == (split == "val")


def _have_image(rows: Dataset) -> list[bool]:
    """Return for each row whether its image has bytes or an existing file, without reading any bytes."""
    column = rows.select_columns("image").cast_column("image", Image(decode=False)).with_format("arrow")[:]["image"]
    has_bytes = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [inline or Path(path or "").is_file() for inline, path in zip(has_bytes, paths, strict=True)]
