"""Sharded parquet of codes and captions, which `predict` writes with a dVAE, as a source without images."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from jaxtyping import UInt

from lightning_dalle.data.filters.rules import Filter
from lightning_dalle.data.images.transforms import Augmentation
from lightning_dalle.data.loading.samplers import SampleIndex
from lightning_dalle.errors import UserError
from lightning_dalle.files import atomic_write

METADATA = b"lightning_dalle.encoding"
"""Metadata key of a shard's `Encoding`."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Description of how the images of a folder were encoded. Every shard contains it; all shards must agree."""

    dvae: str
    """Hash of the dVAE's weights."""
    grid: int
    """Codes per side of an image."""
    codebook_size: int
    image_size: int
    """Side in pixels of the dVAE's input images."""
    augmentation: str
    """Augmentation of the training split."""
    crops: dict[str, int]
    """Number of encoded crops per image, by split."""
    records: dict[str, int]
    """Number of records, by split."""
    shard_size: int
    """Records per shard, except the last one of a split."""
    source: str
    filters: str
    """Filters that the records passed."""
    seed: int
    """Seed of the crops."""
    attribution: str | None
    """Attribution that the license of the images requires."""
    made_on: dict[str, Any] = field(compare=False)
    """Machine, versions and commit, which may differ between shards."""

    @property
    def shards(self) -> "list[Shard]":
        """Shards of all splits: contiguous blocks of records, independent of the number of ranks."""
        shards = []
        for split, count in self.records.items():
            firsts = range(0, count, self.shard_size)
            for i, first in enumerate(firsts):
                name = f"{split}-{i:05d}-of-{len(firsts):05d}.parquet"
                shards.append(Shard(split, name, range(first, min(first + self.shard_size, count))))
        return shards

    def check_equal(self, other: "Encoding", path: Path) -> None:
        """Raise a UserError that names the first difference to the encoding of the shard at `path`."""
        for name in (known.name for known in fields(self) if known.compare):
            expected, found = getattr(self, name), getattr(other, name)
            if expected != found:
                raise UserError(
                    f"{path} was encoded with {name}={found}, but {name}={expected} is expected; remove the file, "
                    "or use another folder"
                )


class Shard(NamedTuple):
    """Contiguous block of a split's records, written by one rank to one file."""

    split: str
    name: str
    """Name of the file."""
    records: range

    def sample_indices(self, crops: int) -> Iterator[SampleIndex]:
        """Yield the indices of this shard's samples in the order of its rows: every record `crops` times.

        Crop number c is the random crop that training would draw in epoch c.
        """
        return (SampleIndex(crop, record) for record in self.records for crop in range(crops))


def write_shard(
    folder: Path, shard: Shard, encoding: Encoding, rows: Dataset, codes: UInt[np.ndarray, "n g g"]
) -> None:
    """Write a shard to a folder atomically.

    `rows` are the captions and ids of the whole split; `codes` has the codes of each of `shard.sample_indices(crops)`.
    """
    columns = rows.select_columns([name for name in ("captions", "id") if name in rows.column_names])
    table = columns.select(shard.records).with_format("arrow")[:]
    if "id" not in table.column_names:
        table = table.append_column("id", pa.array([str(record) for record in shard.records]))
    crops = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), encoding.grid**2)
    offsets = np.arange(len(shard.records) + 1, dtype=np.int32) * encoding.crops[shard.split]
    table = table.append_column("codes", pa.ListArray.from_arrays(offsets, crops))
    with atomic_write(folder / shard.name) as file:
        pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(asdict(encoding))}), file)


def code_type(codebook_size: int) -> np.dtype[Any]:
    """Return the smallest integer type for all codes of a codebook, which saves memory when shards are read."""
    return np.min_scalar_type(codebook_size - 1)


def read_encoding(shard: Path) -> Encoding:
    """Read the description of how a shard's codes were made.

    Raises:
        UserError: if the file is not a shard of codes.
    """
    try:
        metadata = pq.read_schema(shard).metadata or {}
        return Encoding(**json.loads(metadata[METADATA]))
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{shard} is not a shard of codes written by `predict` ({error}); remove it from the folder"
        ) from error


def list_shards(folder: Path) -> list[Path]:
    """Return the existing shards of a folder, sorted."""
    return sorted(folder.glob("*-of-*.parquet"))


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Source of codes that `predict` wrote, from which the transformer trains as from the images themselves.

    Epoch e uses crop e modulo the number of crops.
    """

    path: str
    """Folder of the shards."""

    @cached_property
    def encoding(self) -> Encoding:
        """Description of how the codes were made, from the first shard."""
        shards = list_shards(Path(self.path).expanduser())
        if not shards:
            raise UserError(f"{self.path} contains no shards of codes; write them with `predict` and a dVAE")
        return read_encoding(shards[0])

    @property
    def attribution(self) -> str | None:
        """Attribution that the license of the images requires."""
        return self.encoding.attribution

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """Return splits with the columns codes (crops, g * g), captions and id.

        Raises:
            UserError: if the image size differs, or shards are missing or disagree.
        """
        self._require("data", image_size=image_size)
        encoding, folder = self.encoding, Path(self.path).expanduser()
        files: dict[str, list[str]] = {}
        for shard in encoding.shards:
            files.setdefault(shard.split, []).append(str(folder / shard.name))
        existing = list_shards(folder)
        if len(existing) < len(encoding.shards):
            raise UserError(
                f"{self.path} has {len(existing)} of {len(encoding.shards)} shards of codes; run the same `predict` "
                "again to write the missing ones"
            )
        for file in existing:
            encoding.check_equal(read_encoding(file), file)
        return load_dataset("parquet", data_files=files)

    def check_settings(self, augmentation: Augmentation | None, filters: Sequence[Filter], seed: int) -> None:
        """Raise a UserError if augmentation, filters or, with an augmentation, the seed differ from the encoding's."""
        self._require("data", augmentation=repr(augmentation), filters=repr(list(filters)))
        if augmentation is not None:
            self._require("data", seed=seed)

    def check_dvae(self, weights: str, grid: int, codebook_size: int, checkpoint: Path | None) -> None:
        """Raise a UserError if the codes were not made by the dVAE of a checkpoint, given the hash of its weights."""
        self._require(f"dVAE in {checkpoint}", grid=grid, codebook_size=codebook_size, dvae=weights)

    def _require(self, owner: str, **settings: object) -> None:
        for name, value in settings.items():
            encoded_with = getattr(self.encoding, name)
            if value != encoded_with:
                remedy = f"set data.{name} to {encoded_with}" if owner == "data" else "choose the dVAE of the codes"
                raise UserError(
                    f"the images of {self.path} were encoded with {name}={encoded_with}, but the {owner} has "
                    f"{name}={value}: {remedy}, or encode them again with `predict`"
                )
