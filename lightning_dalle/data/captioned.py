"""Captioned pictures of any Hugging Face form: a name on the hub, or a local folder of images, parquet or WebDataset.

Knows columns and splits. Knows nothing of models, tensors or training.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets, load_dataset

from lightning_dalle.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptionedPictures:
    """Source of captioned pictures, by `datasets.load_dataset`.

    A record without a picture or without a caption is passed over, counted by reason and logged.
    """

    path: str
    """What `load_dataset` opens: a name on the hub ("org/name"), or a local folder with parquet files, WebDataset tars,
    or images beside a metadata.jsonl. A local folder goes before a name on the hub."""
    image: str = "image"
    """Column of the picture; "jpg" in a WebDataset."""
    captions: str = "captions"
    """Column of the captions: a list of them, or one text with a caption on each line. "json.captions" is the field
    `captions` of the column `json`."""
    id: str | None = None
    """Column of what a picture is called by (COCO's image_id); the row's number if not given."""
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "val": "validation"})
    """Our splits by name, each with the data's name of it."""

    def load(self, image_size: int) -> DatasetDict:
        """The splits, with the columns image, captions and id; pictures as they come, whatever the size.

        Raises:
            UserError: if the data cannot be opened, or lacks a split or a column.
        """
        found = self._open()
        missing = sorted(set(self.splits.values()) - set(found))
        if missing:
            raise UserError(
                f"splits name {', '.join(missing)}, but {self.path} has {', '.join(found)}: set splits of the source"
            )
        return DatasetDict({ours: self._split(ours, found[theirs]) for ours, theirs in self.splits.items()})

    def _open(self) -> DatasetDict:
        folder = Path(self.path).expanduser()
        try:
            return load_dataset(str(folder) if folder.exists() else self.path)
        except Exception as error:  # the library raises anything, from its own errors to those of the file formats
            reason = str(error).partition("\n")[0] or type(error).__name__
            kind = "the local folder" if folder.exists() else "no local folder, and the hub's"
            raise UserError(f"the captioned pictures cannot be read from {self.path} ({kind}): {reason}") from error

    def _split(self, name: str, rows: Dataset) -> Dataset:
        columns = {"image": self.image, "captions": self.captions} | ({"id": self.id} if self.id else {})
        taken = {}
        for ours, theirs in columns.items():
            column, _, inner = theirs.partition(".")
            if column not in rows.column_names:
                raise UserError(
                    f"the source's {ours} is to be the column {theirs}, but {self.path} has "
                    f"{', '.join(rows.column_names)}"
                )
            taken[ours] = (column, inner)
        picture = taken["image"][0]
        images = rows.select_columns(picture).rename_columns({picture: "image"})
        images = images.cast_column("image", Image(decode=False))
        texts = rows.select_columns(sorted({column for ours, (column, _) in taken.items() if ours != "image"}))

        def record(row: dict[str, Any], index: int) -> dict[str, Any]:
            def value(of: str) -> Any:
                column, inner = taken[of]
                return (row[column] or {}).get(inner) if inner else row[column]

            return {"captions": caption_list(value("captions")), "id": str(value("id") if self.id else index)}

        features = Features(captions=List(Value("string")), id=Value("string"))
        texts = texts.map(record, with_indices=True, remove_columns=texts.column_names, features=features)
        skipped: Counter[str] = Counter()
        kept = []
        for i, (is_there, captions) in enumerate(zip(_has_picture(images), texts["captions"], strict=True)):
            if not is_there:
                skipped["without a picture"] += 1
            elif not captions:
                skipped["without a caption"] += 1
            else:
                kept.append(i)
        if skipped:
            counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            log.warning("%s, split %s: passed over %s, of %d records", self.path, name, counts, len(rows))
        if not kept:
            raise UserError(f"{self.path} has no captioned picture in the split {name}, of {len(rows)} records")
        joined = concatenate_datasets([images, texts], axis=1)  # side by side: no picture is written again
        return (joined.select(kept) if skipped else joined).cast_column("image", Image())


def caption_list(value: Any) -> list[str]:
    """Captions as they are written down, as a list: a list of texts, or one text with a caption on each line."""
    texts = value.splitlines() if isinstance(value, str) else value or []
    return [text.strip() for text in texts if text and text.strip()]


def _has_picture(images: Dataset) -> list[bool]:
    """Of each record, whether its picture has bytes or a file; no bytes are read."""
    column = images.with_format("arrow")[:]["image"]
    has_bytes = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [there or (path is not None and Path(path).is_file()) for there, path in zip(has_bytes, paths, strict=True)]
