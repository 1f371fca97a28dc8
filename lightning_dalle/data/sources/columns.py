"""Which column is which, and rows of any columns as records.

Knows names and types of columns. Knows nothing of where rows come from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from datasets import Features, Image, List, Value

from lightning_dalle.data.captions import caption_list
from lightning_dalle.errors import UserError

KNOWN = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "file_name", "filename", "image_path", "filepath", "path"),
    "captions": (
        "captions", "caption", "json.captions", "json.caption", "sentences", "description", "text", "txt", "title",
    ),
    "id": ("image_id", "cocoid", "json.image_id", "json.cocoid", "id", "__key__"),
}  # fmt: skip
PICTURE = Features(image=Image(decode=False))
TEXTS = Features(captions=List(Value("string")), id=Value("string"))
RECORD = Features(**PICTURE, **TEXTS)


@dataclass(frozen=True)
class Columns:
    """Where the parts of a record are: each a column and the field in it, or nothing for the whole column."""

    image: tuple[str, str]
    captions: tuple[str, str]
    id: tuple[str, str] | None
    root: Path
    """That the paths of pictures are relative to."""

    @classmethod
    def choose(
        cls, fields: Mapping[str, Iterable[str]], wanted: Mapping[str, str | None], root: Path, origin: str
    ) -> "Columns":
        """The wanted ones, or the first known where none is, in whatever case.

        Args:
            fields: of each column that there is.
            wanted: of `image`, `captions` and `id` the column, or "column.field", or nothing.
            root: that paths are relative to.
            origin: of the rows, for messages.

        Raises:
            UserError: if there is no such column.
        """
        names = [*fields, *(f"{name}.{field}" for name, inner in fields.items() for field in inner)]
        by_lower = {name.lower(): name for name in reversed(names)}
        places: dict[str, tuple[str, str] | None] = {}
        for ours, theirs in wanted.items():
            name = theirs or next((by_lower[known] for known in KNOWN[ours] if known in by_lower), None)
            if name is None and ours == "id":
                places[ours] = None
            elif name not in names:
                raise UserError(
                    f"the source's {ours} is to be the column {name or ' or '.join(KNOWN[ours])}, but {origin} has "
                    f"{', '.join(sorted(names))}"
                )
            else:
                column, _, field = (name, "", "") if name in fields else name.partition(".")
                places[ours] = (column, field)
        return cls(**places, root=root)  # type: ignore[arg-type]

    def check_types(self, features: Features, origin: str) -> None:
        """Raises a UserError if the pictures or captions are numbers."""
        for ours, (column, field) in {"image": self.image, "captions": self.captions}.items():
            feature = features[column][field] if field else features[column]
            feature = feature.feature if isinstance(feature, List) and ours == "captions" else feature
            if isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "binary", "null"):
                raise UserError(
                    f"the source's {ours} is the column {column} of {origin}, but that holds {feature.dtype}; there "
                    f"are {', '.join(features)}"
                )

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Picture, undecoded, captions and id; without one it is called by what its picture is or, if only that is
        known, where: the same wherever a stream is read from.
        """
        image, id = self.picture(row)["image"], _value(row, self.id)
        if id is None:
            what = b"" if image is None else image["bytes"] or str(image["path"]).encode()
            id = xxhash.xxh3_64_hexdigest(what)
        return {"image": image, "captions": caption_list(_value(row, self.captions)), "id": str(id)}

    def records(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The same of several rows, each column of rows and records a list: `datasets` takes hardly longer for many."""
        values = zip(*rows.values(), strict=True)
        made = [self.record(dict(zip(rows, row, strict=True))) for row in values]
        return {name: [record[name] for record in made] for name in RECORD}

    def texts(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Captions and id; without one it is called by its index."""
        id = _value(row, self.id)
        return {"captions": caption_list(_value(row, self.captions)), "id": str(index if id is None else id)}

    def picture(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The picture of a row, from an encoded one, bytes or a path."""
        value = _value(row, self.image)
        if isinstance(value, bytes):
            value = {"bytes": value, "path": None}
        elif isinstance(value, str):
            value = {"bytes": None, "path": value if "://" in value else str(self.root / value)}
        is_there = isinstance(value, dict) and (value.get("bytes") is not None or value.get("path"))
        return {"image": value if is_there else None}


def fields_of(value: Any) -> list[str]:
    """Fields of a column that holds a mapping, from its feature or from a value; a picture has none."""
    return list(value) if isinstance(value, dict) and set(value) != {"bytes", "path"} else []


def _value(row: Mapping[str, Any], place: tuple[str, str] | None) -> Any:
    if place is None:
        return None
    column, field = place
    value = row.get(column)
    if not field:
        return value
    return value.get(field) if isinstance(value, dict) else None
