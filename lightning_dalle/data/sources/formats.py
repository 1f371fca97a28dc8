"""What a path holds, found by looking: tables, WebDataset tars, images beside their metadata or beside their captions.

Knows files and the shapes of folders. Knows nothing of which column is which.
"""

import json
import logging
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from datasets import load_dataset, load_dataset_builder

from lightning_dalle.errors import UserError

log = logging.getLogger(__name__)

PICTURES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
CSV = {"encoding_errors": "ignore", "on_bad_lines": "warn"}
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {"sep": "\t", **CSV}),
    ".jsonl": ("json", {}),
}
TEXTS = (".txt", ".TXT")
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
PAIRS_IN_A_SHARD = 1000
ATTEMPTS = 3
PAUSE = 2.0
"""Seconds before a URL is asked again."""


def find(path: str) -> tuple[str, Any]:
    """The form of a path, and its files by split where we read them ourselves.

    Forms are "tars" (of urls), "pairs" (of pictures), "imagefolder", a suffix of `TABLES`, and "hub".

    Raises:
        UserError: if a folder holds none of them.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return ("tars" if local.suffix == ".tar" else local.suffix), {"train": [str(local)]}
    if "://" in path:
        return "tars", by_split(expand(path), path)
    if not local.is_dir():
        return "hub", None
    files = sorted(file for file in local.rglob("*") if file.is_file() and not file.name.startswith("."))
    suffixes = Counter(file.suffix.lower() for file in files)
    if any(file.name in METADATA for file in files):
        return "imagefolder", None
    for suffix, form in {".tar": "tars", **{suffix: suffix for suffix in TABLES}}.items():
        if suffix in suffixes:
            return form, by_split([str(file) for file in files if file.suffix.lower() == suffix], str(local))
    texts = {file.with_suffix("") for file in files if file.suffix in TEXTS}
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    pairs = [str(file) for file in pictures if file.with_suffix("") in texts]
    if pairs:
        alone = len(texts - {file.with_suffix("") for file in pictures})
        if alone or len(pairs) < len(pictures):
            log.warning(
                "%s: passed over %d pictures without a text and %d texts without a picture", path,
                len(pictures) - len(pairs), alone,
            )  # fmt: skip
        return "pairs", by_split(pairs, str(local), by_folder=True)
    found = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(5))
    raise UserError(
        "the captioned pictures cannot be read from a folder without metadata.jsonl, .tar, "
        f"{', '.join(TABLES)}, or pictures with a .txt of the same name: {path} has {found or 'no files'}"
    )


def open_table(form: str, path: str, files: dict[str, list[str]] | None, streamed: bool) -> Any:
    """What `datasets` opens, as it opens it."""
    if form in TABLES:
        builder, options = TABLES[form]
        return load_dataset(builder, data_files=files, streaming=streamed, **options)
    if form == "imagefolder":
        return load_dataset("imagefolder", data_dir=str(Path(path).expanduser()), streaming=streamed)
    return load_dataset(path, streaming=streamed)


def hub_tars(path: str) -> dict[str, list[str]] | None:
    """URLs of a hub dataset's tars by split, if it is of tars: our reader forgives what the library's stops at."""
    builder = load_dataset_builder(path)
    if builder.name != "webdataset":
        return None
    return {str(split): list(urls) for split, urls in builder.config.data_files.items()}


def by_split(files: Iterable[str], root: str, by_folder: bool = False) -> dict[str, list[str]]:
    """Files by the split that a word in their path below the root names; train where none does.

    Args:
        files: their paths or URLs.
        root: where they are.
        by_folder: whether only the first folder counts, since the names of files are words of their own.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        folder, _, rest = file.removeprefix(root).lstrip("/").partition("/")
        named = (folder if rest else "") if by_folder else f"{folder}/{rest}"
        words = set(re.findall("[a-z]+", named.lower()))
        split = next((split for split, known in SPLIT_WORDS.items() if words & known), "train")
        splits.setdefault(split, []).append(file)
    return splits


def expand(url: str) -> list[str]:
    """URLs of "https://host/{00000..00099}.tar"; any other is itself."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if braces is None:
        return [url]
    first, last = braces.groups()
    return [
        url[: braces.start()] + str(number).zfill(len(first)) + url[braces.end() :]
        for number in range(int(first), int(last) + 1)
    ]


def samples(url: str) -> Iterator[dict[str, Any]]:
    """Of a tar, the files of each base name as one row: JSON parsed, pictures undecoded, all else as bytes.

    `__key__` is the base name below that of the tar. A tar that breaks off is read as far as it goes, and named. A URL
    that fails is asked again, and what was given of it before is passed over.

    Raises:
        UserError: if it cannot be read, which is no fault of the tar.
    """
    given = 0
    for attempts_left in reversed(range(ATTEMPTS if "://" in url else 1)):
        try:
            for row in islice(_rows(url), given, None):
                given += 1
                yield row
            return
        except (tarfile.TarError, EOFError) as error:
            log.warning("%s is read as far as it goes: %s", url, error)
            return
        except Exception as error:  # file systems, and those of the network, raise anything
            if not attempts_left:
                raise UserError(
                    f"{url} cannot be read, after {given} records: {error or type(error).__name__}"
                ) from error
            log.warning("%s is asked again, after %d records: %s", url, given, error)
            time.sleep(PAUSE)


def _rows(url: str) -> Iterator[dict[str, Any]]:
    with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        entries = ((*_split_name(entry.name), entry) for entry in tar if entry.isfile())
        for key, group in groupby(entries, key=lambda entry: entry[0]):
            row: dict[str, Any] = {"__key__": f"{PurePosixPath(url).stem}/{key}"}
            for _, field, entry in group:
                content = tar.extractfile(entry).read()  # type: ignore[union-attr]
                row[field] = _decoded(field, content)
            yield row


def lines(path: str) -> Iterator[dict[str, Any]]:
    """Of JSON lines, each that is a mapping as a row; the others are counted in the log."""
    broken = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                broken += bool(line.strip())
    if broken:
        log.warning("%s: passed over %d lines that are no JSON", path, broken)


def _split_name(name: str) -> tuple[str, str]:
    """Base name with its folders, and the extension from the first dot of the file's name on."""
    folder, slash, file = name.rpartition("/")
    base, _, field = file.partition(".")
    return folder + slash + base, field.lower()


def _decoded(field: str, content: bytes) -> Any:
    if field.endswith("json"):
        try:
            return json.loads(content)
        except ValueError:
            return None
    if f".{field.rpartition('.')[2]}" in PICTURES:
        return {"bytes": content, "path": None}
    return content


def text_of(picture: Path) -> Path:
    """The text beside a picture, whose name may be in capitals, as cameras have them."""
    texts = [picture.with_suffix(suffix) for suffix in TEXTS]
    return next((text for text in texts if text.is_file()), texts[0])


def pairs(pictures: Iterable[str], root: Path) -> Iterator[dict[str, Any]]:
    """Pictures with the captions in the text of the same name, one on each line, called by their path in the root."""
    for picture in pictures:
        path = Path(picture)
        captions = text_of(path).read_bytes()
        name = path.relative_to(root).with_suffix("").as_posix()
        yield {"image": {"bytes": None, "path": picture}, "captions": captions, "id": name}
