"""Several sources as one, in whatever proportion.

Knows sources and weights. Knows nothing of how records are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets import Image as EncodedImage

from lightning_dalle.data.sources.source import Source
from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Source of several sources' records, all of them streamed or none.

    Training draws from each source in proportion to its weight, and from each every record once before any comes again.
    Without streaming an epoch is as many draws as there are records in all. Other splits are those of the sources,
    one after the other.
    """

    sources: list[Source]
    """What is mixed."""
    weights: list[float]
    """One for each source; only their proportions matter."""

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sources) or min(self.weights, default=0) <= 0:
            raise UserError(
                f"a mixture of {len(self.sources)} sources needs as many weights above 0, not {self.weights}"
            )

    @property
    def attribution(self) -> str | None:
        """Of the pictures of all sources."""
        found = dict.fromkeys(getattr(source, "attribution", None) for source in self.sources)
        return " ".join(attribution for attribution in found if attribution) or None

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """The splits, with the columns image (undecoded), captions and id; rows also have `source`, its number."""
        found = [source.load(image_size) for source in self.sources]
        streamed = [isinstance(splits, IterableDatasetDict) for splits in found]
        if any(streamed) != all(streamed):
            raise UserError(
                f"the sources of a mixture are all to be streamed or none, but {sum(streamed)} of {len(found)} are"
            )
        lacking = [str(i) for i, splits in enumerate(found) if "train" not in splits]
        if lacking and any("train" in splits for splits in found):
            raise UserError(
                f"every source of a mixture needs a split train, but {', '.join(lacking)} (from 0) has none"
            )
        names = dict.fromkeys(name for splits in found for name in splits)
        if all(streamed):
            return IterableDatasetDict({name: concatenate_datasets(self._having(name, found)) for name in names})
        numbered = [{name: _numbered(rows, i) for name, rows in splits.items()} for i, splits in enumerate(found)]
        return DatasetDict({name: concatenate_datasets(self._having(name, numbered)) for name in names})

    def parts(self, split: str, image_size: int) -> list[IterableDataset]:
        """A streamed split of every source that has it."""
        return self._having(split, [source.load(image_size) for source in self.sources])

    def _having(self, split: str, found: Sequence[Any]) -> list[Any]:
        return [splits[split] for splits in found if split in splits]


def _numbered(rows: Dataset, source: int) -> Dataset:
    """Columns that are the same for all sources.

    Raises:
        UserError: if it has codes in the place of pictures.
    """
    if "image" not in rows.column_names:
        raise UserError(
            f"a mixture is of pictures, but its source {source} (from 0) has {', '.join(rows.column_names)}: encode "
            "the mixture, rather than mix what is encoded"
        )
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [str(i) for i in range(len(rows))])
    rows = rows.select_columns(["image", "captions", "id"]).cast_column("image", EncodedImage(decode=False))
    return rows.add_column("source", [source] * len(rows))
