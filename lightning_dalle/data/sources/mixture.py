"""Weighted mixture of several sources."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets import Image as EncodedImage

from lightning_dalle.data.sources.source import Source
from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Mixture of sources, which must be all streamed or all not.

    Training selects each source in proportion to its weight, and uses every record of a source once before it repeats
    any. Without streaming, an epoch has as many samples as all sources together have records. Other splits are the
    sources' splits, concatenated.
    """

    sources: list[Source]
    """Sources to mix."""
    weights: list[float]
    """Weight of each source; only their proportions matter."""

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sources) or min(self.weights, default=0) <= 0:
            raise UserError(
                f"a mixture of {len(self.sources)} sources needs {len(self.sources)} weights above 0, but weights is "
                f"{self.weights}"
            )

    @property
    def attribution(self) -> str | None:
        """Attributions that the licenses of the sources' images require."""
        found = dict.fromkeys(getattr(source, "attribution", None) for source in self.sources)
        return " ".join(attribution for attribution in found if attribution) or None

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """Return splits with the columns image (undecoded), captions, id and, unless streamed, source (its index).

        Raises:
            UserError: if only some sources are streamed, only some have a split train, or one has codes, not images.
        """
        loaded: list[Any] = [source.load(image_size) for source in self.sources]
        is_streamed = [isinstance(splits, IterableDatasetDict) for splits in loaded]
        if any(is_streamed) != all(is_streamed):
            raise UserError(
                f"{sum(is_streamed)} of the mixture's {len(loaded)} sources are streamed; set the same `streaming` for "
                "all sources"
            )
        without_train = [str(i) for i, splits in enumerate(loaded) if "train" not in splits]
        if without_train and any("train" in splits for splits in loaded):
            raise UserError(
                f"source {', '.join(without_train)} of the mixture (counted from 0) has no split train: set its "
                "`splits` to {train: NAME}, where NAME is one of its own splits, or remove it"
            )
        names = dict.fromkeys(name for splits in loaded for name in splits)
        if not all(is_streamed):
            loaded = [{name: _add_index(rows, i) for name, rows in splits.items()} for i, splits in enumerate(loaded)]
        merged = {name: concatenate_datasets([splits[name] for splits in loaded if name in splits]) for name in names}
        return IterableDatasetDict(merged) if all(is_streamed) else DatasetDict(merged)

    def streams(self, split: str, image_size: int) -> list[IterableDataset]:
        """Return a stream of the split from each source that has this split."""
        return [splits[split] for source in self.sources if split in (splits := source.load(image_size))]


def _add_index(rows: Dataset, source: int) -> Dataset:
    """Return rows with the columns that all sources share, and the index of their source."""
    if "image" not in rows.column_names:
        raise UserError(
            f"source {source} of the mixture (counted from 0) has no column image, only "
            f"{', '.join(rows.column_names)}: mix sources of images, and encode the mixture with `predict`"
        )
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [str(i) for i in range(len(rows))])
    rows = rows.select_columns(["image", "captions", "id"]).cast_column("image", EncodedImage(decode=False))
    return rows.add_column("source", [source] * len(rows))
