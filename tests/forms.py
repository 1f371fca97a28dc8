"""Writers of the same captioned images in every format that `CaptionedImages` reads."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as EncodedImage
from PIL import Image

SHARDS = 3
"""Files per split, for formats that have several."""


class Photo(NamedTuple):
    content: bytes
    captions: list[str]
    id: str


Splits = Mapping[str, list[Photo]]


def squares(count: int, first: int = 0) -> list[Photo]:
    """Return images whose color is their number."""
    photos = []
    for i in range(first, first + count):
        file = io.BytesIO()
        Image.new("RGB", (12, 8), (i % 256, i // 256, 0)).save(file, "PNG")
        photos.append(Photo(file.getvalue(), [f"square {i}", f"a square of {i}"], str(100 + i)))
    return photos


def image_folder(root: Path, splits: Splits) -> None:
    for split, photos in splits.items():
        lines = [
            json.dumps({"file_name": _file(root / split, p), "image_id": p.id, "captions": p.captions}) for p in photos
        ]
        (root / split / "metadata.jsonl").write_text("\n".join(lines))


def pairs(root: Path, splits: Splits) -> None:
    for split, photos in splits.items():
        for photo in photos:
            name = _file(root / split, photo)
            (root / split / name).with_suffix(".txt").write_text("\n".join(photo.captions))


def csv_of_paths(root: Path, splits: Splits) -> None:
    _table(root, splits, ".csv", ",")


def tsv_of_paths(root: Path, splits: Splits) -> None:
    _table(root, splits, ".tsv", "\t")


def parquet_of_bytes(root: Path, splits: Splits) -> None:
    features = Features(image=EncodedImage(), captions=List(Value("string")), image_id=Value("string"))
    _parquet(root, splits, features, lambda photo: {"bytes": photo.content, "path": None})


def parquet_of_paths(root: Path, splits: Splits) -> None:
    features = Features(image=Value("string"), captions=List(Value("string")), image_id=Value("string"))
    _parquet(root, splits, features, lambda photo: f"images/{_file(root / 'images', photo)}")


def dataset(photos: list[Photo]) -> Dataset:
    features = Features(image=EncodedImage(), captions=List(Value("string")), image_id=Value("string"))
    rows = [{"image": {"bytes": p.content, "path": None}, "captions": p.captions, "image_id": p.id} for p in photos]
    return Dataset.from_list(rows, features=features)


def saved_to_disk(root: Path, splits: Splits) -> None:
    DatasetDict({split: dataset(photos) for split, photos in splits.items()}).save_to_disk(root)


def tars(root: Path, splits: Splits) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split, photos in splits.items():
        for shard in range(SHARDS):
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
                for photo in photos[shard::SHARDS]:
                    meta = json.dumps({"captions": photo.captions, "image_id": photo.id}).encode()
                    for name, content in ((f"{photo.id}.jpg", photo.content), (f"{photo.id}.json", meta)):
                        entry = tarfile.TarInfo(name)
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))


FORMATS: dict[str, Callable[[Path, Splits], None]] = {
    write.__name__: write
    for write in (
        image_folder,
        pairs,
        csv_of_paths,
        tsv_of_paths,
        parquet_of_bytes,
        parquet_of_paths,
        saved_to_disk,
        tars,
    )
}


def _file(folder: Path, photo: Photo) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{photo.id}.jpg").write_bytes(photo.content)
    return f"{photo.id}.jpg"


def _table(root: Path, splits: Splits, suffix: str, separator: str) -> None:
    for split, photos in splits.items():
        rows = [(f"images/{_file(root / 'images', p)}", "\n".join(p.captions), p.id) for p in photos]
        with (root / f"{split}{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([("file_name", "Caption", "image_id"), *rows])


def _parquet(root: Path, splits: Splits, features: Features, image: Callable[[Photo], Any]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split, photos in splits.items():
        for shard in range(SHARDS):
            rows = [{"image": image(p), "captions": p.captions, "image_id": p.id} for p in photos[shard::SHARDS]]
            Dataset.from_list(rows, features=features).to_parquet(root / f"{split}-{shard:05d}.parquet")
