"""What a source of captioned pictures is.

Knows the columns that it gives. Knows nothing of where it has them from.
"""

from typing import Protocol, runtime_checkable

from datasets import DatasetDict, IterableDatasetDict


@runtime_checkable
class Source(Protocol):
    """Where captioned pictures come from."""

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """Splits by name, each with the columns `image`, `captions` (a list) and, if there is one, `id`: `train` and
        `val` for a fit, `val` or `test` to evaluate on.

        Pictures may be of any size; a source that draws its own may use the wanted one, in pixels. Those of streamed
        splits are undecoded.
        """
        ...
