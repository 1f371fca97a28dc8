"""Files and folders: atomic writes, hashes, and YAML with a clear error."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_fingerprint(files: Iterable[str]) -> str:
    """Return a cache key: the hash of path, size and modification time of those `files` that exist on this machine."""
    stats = [(file, Path(file).stat()) for file in files if Path(file).exists()]
    return hashlib.sha256(repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]).encode()).hexdigest()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: if the folder cannot be created, for example because a parent is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the output folder {folder} ({error.strerror}); choose another --out") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to `path` on success and removed on an error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a dictionary as JSON atomically.

    Raises:
        UserError: if a value is NaN or infinite, which JSON cannot represent.
    """
    try:
        text = json.dumps(record, indent=2, default=str, allow_nan=False)
    except ValueError as error:
        raise UserError(f"cannot write {path}: {error}; check whether training diverged") from error
    write_text(path, text + "\n")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys, such as a config.

    Raises:
        UserError: if the file is missing, is not valid YAML, or is not a mapping of keys.
    """
    import yaml

    try:
        # The C loader takes a tenth of the time.
        keys = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the config {path}: {reason}; correct its path or its YAML") from error
    if not isinstance(keys, dict):
        raise UserError(f"the config {path} contains {keys!r:.80}: replace it by a YAML mapping, `key: value`")
    return keys
