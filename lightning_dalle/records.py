"""What is written beside every number, and how: hashes, the commit, files that are there whole or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError


def sha256(file: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def commit() -> str | None:
    """The commit of this code where it runs from a clone, marked if there are changes beside it."""
    if shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None


def make_folder(folder: Path) -> None:
    """Makes a folder to write into, and those above it, where they are not there yet.

    Raises:
        UserError: if it cannot be made, as below a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} is to be written into, but cannot be made: {error.strerror}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file or a folder by, which takes the name of `path` when all is written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    yield partial
    partial.rename(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record that is there whole or not at all.

    Raises:
        UserError: if a number in it is none: JSON has no such thing, and a figure must not be.
    """
    try:
        text = json.dumps(record, indent=2, default=str, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path} is not written, since a figure in it is no number: {error}") from error
    write_whole(path, text + "\n")
