"""Captioned pictures of any Hugging Face form: a name on the hub, or a local folder of images, parquet or WebDataset.

Knows columns and splits. Knows nothing of models, tensors or training.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets, load_dataset

from lightning_dalle.errors import UserError

log = logging.getLogger(__name__)

KNOWN_COLUMNS = {
    "image": ("image", "jpg", "jpeg", "png", "webp"),
    "captions": (
        "captions", "caption", "json.captions", "json.caption", "sentences", "description", "text", "txt",
    ),
    "id": ("image_id", "cocoid", "json.image_id", "json.cocoid", "id"),
}  # fmt: skip
VAL_SPLITS = ("validation", "val", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class CaptionedPictures:
    """Source of captioned pictures, by `datasets.load_dataset`.

    A record without a picture or without a caption is passed over, counted by reason and logged.
    """

    path: str
    """What `load_dataset` opens: a name on the hub ("org/name"), or a local folder with parquet files, WebDataset tars,
    or images beside a metadata.jsonl. A local folder goes before a name on the hub."""
    image: str | None = None
    """Column of the picture; if not given, the first there is of image, jpg, jpeg, png and webp."""
    captions: str | None = None
    """Column of the captions: a list of them, or one text with a caption on each line. "json.captions" is the field
    `captions` of the column `json`. If not given, the first there is of captions, caption, json.captions, json.caption,
    sentences, description, text and txt."""
    id: str | None = None
    """Column of what a picture is called by; if not given, the first there is of image_id, cocoid, json.image_id,
    json.cocoid and id, or else the row's number."""
    splits: dict[str, str] | None = None
    """Our splits by name, each with the data's name of it. If not given, `train` is train and `val` is the first there
    is of validation, val, valid and test."""

    def load(self, image_size: int) -> DatasetDict:
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
        return DatasetDict({ours: self._split(ours, found[theirs]) for ours, theirs in splits.items()})

    def _open(self) -> DatasetDict:
        folder = Path(self.path).expanduser()
        try:
            return load_dataset(str(folder) if folder.exists() else self.path)
        except Exception as error:  # the library raises anything, from its own errors to those of the file formats
            reason = str(error).partition("\n")[0] or type(error).__name__
            kind = "the local folder" if folder.exists() else "no local folder, and the hub's"
            raise UserError(f"the captioned pictures cannot be read from {self.path} ({kind}): {reason}") from error

    def _split(self, split: str, rows: Dataset) -> Dataset:
        names = rows.column_names
        fields = {*names, *(f"{name}.{inner}" for name in names for inner in _inner(rows.features[name]))}
        chosen = {"image": self.image, "captions": self.captions, "id": self.id}
        taken: dict[str, tuple[str, str]] = {}
        for ours, theirs in chosen.items():
            column = theirs or next((known for known in KNOWN_COLUMNS[ours] if known in fields), None)
            if column is None and ours == "id":
                continue
            if column not in fields:
                raise UserError(
                    f"the source's {ours} is to be the column {column or ' or '.join(KNOWN_COLUMNS[ours])}, but "
                    f"{self.path} has {', '.join(sorted(fields))}"
                )
            name, _, inner = str(column).partition(".")
            taken[ours] = (name, inner)
        picture = taken["image"][0]
        images = rows.select_columns(picture).rename_columns({picture: "image"})
        images = images.cast_column("image", Image(decode=False))
        texts = rows.select_columns(sorted({column for ours, (column, _) in taken.items() if ours != "image"}))

        def record(row: Mapping[str, Any], index: int) -> dict[str, Any]:
            def value(of: str) -> Any:
                column, inner = taken[of]
                return (row[column] or {}).get(inner) if inner else row[column]

            return {"captions": caption_list(value("captions")), "id": str(value("id") if "id" in taken else index)}

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
            log.warning("%s, split %s: passed over %s, of %d records", self.path, split, counts, len(rows))
        if not kept:
            raise UserError(f"{self.path} has no captioned picture in the split {split}, of {len(rows)} records")
        joined = concatenate_datasets([images, texts], axis=1)  # side by side: no picture is written again
        return (joined.select(kept) if skipped else joined).cast_column("image", Image())


def caption_list(value: Any) -> list[str]:
    """Captions as they are written down, as a list: a list of texts, or one text with a caption on each line."""
    texts = value.splitlines() if isinstance(value, str) else value or []
    return [text.strip() for text in texts if text and text.strip()]


def _inner(feature: Any) -> list[str]:
    """Fields of a column that holds a mapping."""
    return list(feature) if isinstance(feature, dict) else []


def _has_picture(images: Dataset) -> list[bool]:
    """Of each record, whether its picture has bytes or a file; no bytes are read."""
    column = images.with_format("arrow")[:]["image"]
    has_bytes = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [there or (path is not None and Path(path).is_file()) for there, path in zip(has_bytes, paths, strict=True)]
