"""Choice of the image, caption and id columns, and conversion of rows with any columns to records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from datasets import Features, Image, List, Value

from lightning_dalle.data.captions import caption_list
from lightning_dalle.errors import UserError

KNOWN_COLUMNS = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "file_name", "filename", "image_path", "filepath", "path"),
    "captions": (
        "captions", "caption", "json.captions", "json.caption", "sentences", "description", "text", "txt", "title",
    ),
    "id": ("image_id", "cocoid", "json.image_id", "json.cocoid", "id", "__key__"),
}  # fmt: skip
RECORD = Features(image=Image(decode=False), captions=List(Value("string")), id=Value("string"))


@dataclass(frozen=True)
class Columns:
    """Column and field of each part of a record; an empty field stands for the whole column."""

    image: tuple[str, str]
    captions: tuple[str, str]
    id: tuple[str, str] | None
    root: Path
    """Folder that the paths of images are relative to."""

    @classmethod
    def choose(
        cls, fields: Mapping[str, Iterable[str]], wanted: Mapping[str, str | None], root: Path, origin: str
    ) -> "Columns":
        """Choose the wanted columns, or the first known ones where none is given, ignoring case.

        Args:
            fields: fields of each existing column.
            wanted: for each of `image`, `captions` and `id`, "column", "column.field" or None.
            root: folder that the paths of images are relative to.
            origin: name of the data, for error messages.

        Raises:
            UserError: if a column does not exist.
        """
        names = [*fields, *(f"{name}.{field}" for name, inner in fields.items() for field in inner)]
        by_lower = {name.lower(): name for name in reversed(names)}
        chosen: dict[str, tuple[str, str] | None] = {}
        for part, wanted_name in wanted.items():
            known = KNOWN_COLUMNS[part]
            name = wanted_name or next((by_lower[option] for option in known if option in by_lower), None)
            if name is None and part == "id":
                chosen[part] = None
            elif name not in names:
                raise UserError(
                    f"{origin} has no column {name or ' or '.join(known)} for the {part}; set the source's `{part}` to "
                    f"one of {', '.join(sorted(names))}"
                )
            else:
                column, _, field = (name, "", "") if name in fields else name.partition(".")
                chosen[part] = (column, field)
        return cls(**chosen, root=root)  # type: ignore[arg-type]

    def check_types(self, features: Features, origin: str) -> None:
        """Raise a UserError if the images or captions are numbers."""
        for part, (column, field) in {"image": self.image, "captions": self.captions}.items():
            feature = features[column][field] if field else features[column]
            feature = feature.feature if isinstance(feature, List) and part == "captions" else feature
            if isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "binary", "null"):
                raise UserError(
                    f"the column {column} of {origin} holds {feature.dtype}, so it cannot be the {part}; set the "
                    f"source's `{part}` to one of {', '.join(features)}"
                )

    def record(self, row: Mapping[str, Any], index: int | None = None) -> dict[str, Any]:
        """Return a row's undecoded image, its captions and its id.

        A row without an id gets its index. If that is unknown, as in a stream, the id is a hash of the image's bytes or
        path, which all readers of the stream compute alike.
        """
        image, id = self._encoded_image(row), _value(row, self.id)
        if id is None:
            id = index
        if id is None:
            hashed = b"" if image is None else image["bytes"] or str(image["path"]).encode()
            id = xxhash.xxh3_64_hexdigest(hashed)
        return {"image": image, "captions": caption_list(_value(row, self.captions)), "id": str(id)}

    def records(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Convert a batch of rows to records, both as lists by column: faster in `datasets` than single rows."""
        values = zip(*rows.values(), strict=True)
        records = [self.record(dict(zip(rows, row, strict=True))) for row in values]
        return {name: [record[name] for record in records] for name in RECORD}

    def _encoded_image(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        value = _value(row, self.image)
        if isinstance(value, bytes):
            value = {"bytes": value, "path": None}
        elif isinstance(value, str):
            value = {"bytes": None, "path": value if "://" in value else str(self.root / value)}
        exists = isinstance(value, dict) and (value.get("bytes") is not None or value.get("path"))
        return value if exists else None


def fields_of(value: Any) -> list[str]:
    """Return the fields of a column of mappings, given its feature or one value; an encoded image has none."""
    return list(value) if isinstance(value, dict) and set(value) != {"bytes", "path"} else []


def _value(row: Mapping[str, Any], place: tuple[str, str] | None) -> Any:
    if place is None:
        return None
    column, field = place
    value = row.get(column)
    if not field:
        return value
    return value.get(field) if isinstance(value, dict) else None
