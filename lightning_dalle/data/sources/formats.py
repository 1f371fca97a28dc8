"""Detection of a data set's format from its files, and readers for WebDataset tars, JSON lines and image-text pairs."""

import json
import logging
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from braceexpand import braceexpand
from datasets import load_dataset, load_dataset_builder, load_from_disk

from lightning_dalle.data.images.decoding import IMAGE_EXTENSIONS, find_images
from lightning_dalle.errors import UserError

log = logging.getLogger(__name__)

METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
_CSV_OPTIONS = {"encoding_errors": "ignore", "on_bad_lines": "warn"}
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", _CSV_OPTIONS),
    ".tsv": ("csv", {"sep": "\t", **_CSV_OPTIONS}),
    ".jsonl": ("json", {}),
}
"""Builder of `datasets` and its options, by suffix of a table."""
CAPTION_SUFFIXES = (".txt", ".TXT")
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
MAX_ATTEMPTS = 3
RETRY_SECONDS = 2.0


def detect_format(path: str) -> tuple[str, Any]:
    """Return the format of the data at a path, and its files by split.

    The format is "tars" (with URLs), "pairs" (with images), a suffix of `TABLES` or, without files, "imagefolder",
    "save_to_disk" or "hub".

    Raises:
        UserError: if a folder has none of these formats, or the braces of a URL do not match.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return ("tars" if local.suffix == ".tar" else local.suffix), {"train": [str(local)]}
    if "://" in path:
        try:
            return "tars", group_by_split(braceexpand(path), path)
        except ValueError as error:
            raise UserError(f"the braces in {path} do not match; write one range as {{00000..00099}}") from error
    if not local.is_dir():
        return "hub", None
    if (local / "dataset_dict.json").is_file() or {"state.json", "dataset_info.json"} <= set(os.listdir(local)):
        return "save_to_disk", None
    files = sorted(file for file in local.rglob("*") if file.is_file() and not file.name.startswith("."))
    suffixes = Counter(file.suffix.lower() for file in files)
    if any(file.name in METADATA_FILES for file in files):
        return "imagefolder", None
    for suffix, format in {".tar": "tars", **{suffix: suffix for suffix in TABLES}}.items():
        if suffix in suffixes:
            found = [str(file) for file in files if file.suffix.lower() == suffix]
            return format, group_by_split(found, str(local))
    captions = {file.with_suffix("") for file in files if file.suffix in CAPTION_SUFFIXES}
    images, _ = find_images(local, captions=CAPTION_SUFFIXES)
    pairs = [str(file) for file in images if file.with_suffix("") in captions]
    if pairs:
        unpaired = len(captions - {file.with_suffix("") for file in images})
        if unpaired or len(pairs) < len(images):
            log.warning(
                "%s: skipped %d images without a caption file and %d caption files without an image", path,
                len(images) - len(pairs), unpaired,
            )  # fmt: skip
        return "pairs", group_by_split(pairs, str(local), first_folder_only=True)
    counts = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(5))
    raise UserError(
        f"cannot read captioned images from {path}: it has {counts or 'no files'}, but must have a metadata.jsonl, "
        f".tar, {', '.join(TABLES)}, or images with a .txt of the same name"
    )


def open_dataset(format: str, path: str, files: dict[str, list[str]] | None, streaming: bool, **hub: str | None) -> Any:
    """Open a table, an image folder, a saved dataset or one of the hub (with name and revision) by `datasets`."""
    if format in TABLES:
        builder, options = TABLES[format]
        return load_dataset(builder, data_files=files, streaming=streaming, **options)
    if format == "imagefolder":
        return load_dataset("imagefolder", data_dir=str(Path(path).expanduser()), streaming=streaming)
    if format == "save_to_disk":
        return load_from_disk(str(Path(path).expanduser()))
    return load_dataset(path, streaming=streaming, **hub)


def hub_tars(path: str, **hub: str | None) -> dict[str, list[str]] | None:
    """Return the URLs of a hub dataset's tars by split, or None if it has another format.

    Our reader skips errors at which the reader of `datasets` stops.
    """
    builder = load_dataset_builder(path, **hub)
    if builder.name != "webdataset":
        return None
    return {str(split): list(urls) for split, urls in builder.config.data_files.items()}


def group_by_split(files: Iterable[str], root: str, first_folder_only: bool = False) -> dict[str, list[str]]:
    """Group files by the split that a word in their path below the root names, with train as the default.

    If the names of the files are arbitrary, `first_folder_only` ignores all but the first folder below the root.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        folder, _, rest = file.removeprefix(root).lstrip("/").partition("/")
        name = (folder if rest else "") if first_folder_only else f"{folder}/{rest}"
        words = set(re.findall("[a-z]+", name.lower()))
        split = next((split for split, known in SPLIT_WORDS.items() if words & known), "train")
        splits.setdefault(split, []).append(file)
    return splits


def read_tar(url: str) -> Iterator[dict[str, Any]]:
    """Yield one row per base name in a tar: JSON parsed, images undecoded, other files as bytes.

    The column `__key__` is the tar's name followed by the base name. A corrupt tar yields the rows before the error,
    which is logged. A URL that fails is opened again, and rows that were already yielded are skipped.

    Raises:
        UserError: if the file or URL cannot be read.
    """
    num_read = 0
    for attempts_left in reversed(range(MAX_ATTEMPTS if "://" in url else 1)):
        try:
            for row in islice(_tar_rows(url), num_read, None):
                num_read += 1
                yield row
            return
        except (tarfile.TarError, EOFError) as error:
            log.warning("%s is truncated or corrupt, only its first %d records are used: %s", url, num_read, error)
            return
        except Exception as error:  # local and remote file systems raise exceptions of any type
            reason = str(error) or type(error).__name__
            if not attempts_left:
                raise UserError(
                    f"cannot read {url} after {num_read} records: {reason}; check the file or the connection"
                ) from error
            log.warning("retrying %s after %d records: %s", url, num_read, reason)
            time.sleep(RETRY_SECONDS)


def _tar_rows(url: str) -> Iterator[dict[str, Any]]:
    with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        entries = ((*_split_name(entry.name), entry) for entry in tar if entry.isfile())
        for key, group in groupby(entries, key=lambda entry: entry[0]):
            row: dict[str, Any] = {"__key__": f"{PurePosixPath(url).stem}/{key}"}
            for _, field, entry in group:
                row[field] = _parse(field, tar.extractfile(entry).read())  # type: ignore[union-attr]
            yield row


def _split_name(name: str) -> tuple[str, str]:
    """Return a path up to the first dot of the file name, and the lower-case extension after that dot."""
    folder, slash, file = name.rpartition("/")
    base, _, field = file.partition(".")
    return folder + slash + base, field.lower()


def _parse(field: str, content: bytes) -> Any:
    if field.endswith("json"):
        try:
            return json.loads(content)
        except ValueError:
            return None
    if f".{field.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
        return {"bytes": content, "path": None}
    return content


def read_json_lines(path: str) -> Iterator[dict[str, Any]]:
    """Yield each line that is a JSON object; log the number of other lines."""
    num_skipped = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                num_skipped += bool(line.strip())
    if num_skipped:
        log.warning("%s: skipped %d lines that are not JSON objects", path, num_skipped)


def caption_file(image: str) -> Path:
    """Return the path of an image's caption file."""
    files = [Path(image).with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def read_pairs(images: Iterable[str], root: Path) -> Iterator[dict[str, Any]]:
    """Yield the path of each image, the content of its caption file, and its id: the path below the root."""
    for image in images:
        id = Path(image).relative_to(root).with_suffix("").as_posix()
        yield {"image": {"bytes": None, "path": image}, "captions": caption_file(image).read_bytes(), "id": id}
