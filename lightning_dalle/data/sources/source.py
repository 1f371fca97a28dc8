"""Interface of all sources of captioned images, and the hash that assigns records to splits."""

import hashlib
from typing import Protocol, runtime_checkable

from datasets import DatasetDict, IterableDatasetDict


@runtime_checkable
class Source(Protocol):
    """Source of captioned images."""

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """Return splits by name: `train` and `val` for a fit, `val` or `test` for an evaluation.

        Each split has the columns `image`, `captions` (a list) and, if records have ids, `id`. Images may have any
        size; a source that renders its images may use `image_size`, in pixels. Images of streamed splits are undecoded.
        """
        ...


def source_name(source: object) -> str:
    """Return a source's path; else the class and fingerprint of its dataset object, or the source's class."""
    path = getattr(source, "path", source)
    if isinstance(path, str):
        return path
    parts = list(path.values()) if isinstance(path, dict) else [path]
    # Dataset._fingerprint is private; num_rows is public. Streams have neither.
    marks = [str(getattr(part, "_fingerprint", None) or getattr(part, "num_rows", "")) for part in parts]
    return " ".join([type(path).__name__, *filter(None, marks)])


def stable_hash(text: str) -> int:
    """Return a 64-bit hash of a text, which is equal on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
