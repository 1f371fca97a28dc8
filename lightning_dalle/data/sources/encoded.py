"""Pictures that were encoded once: sharded parquet of codes and captions, without pixels.

Knows shards, and what their codes were made by. Knows nothing of pictures, models or training.
"""

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
from lightning_dalle.data.loading.samplers import Draw
from lightning_dalle.errors import UserError
from lightning_dalle.files import atomic_write

METADATA = b"lightning_dalle.encoding"
"""Key of the `Encoding` in a shard's own metadata."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the pictures of a folder became codes. Every shard carries it, and all shards of a folder agree in it."""

    dvae: str
    """Hash of the dVAE's weights."""
    grid: int
    """Codes along one side of a picture."""
    codebook_size: int
    """Codes there are."""
    image_size: int
    """Pixels along one side of what the dVAE was given."""
    augmentation: str
    """How the crops of the training split were cut."""
    crops: dict[str, int]
    """Of each split, how many times every picture was encoded."""
    records: dict[str, int]
    """Of each split, how many pictures."""
    shard_size: int
    """Pictures in every shard of a split but its last."""
    source: str
    """Where the pictures came from."""
    filters: str
    """What they had to pass."""
    seed: int
    """Of the crops."""
    attribution: str | None
    """What the licence of the pictures asks of everything made from them."""
    made_on: dict[str, Any] = field(compare=False)
    """Machine, versions and commit: for a reader, and free to differ between shards."""

    @property
    def shards(self) -> "list[Shard]":
        """Contiguous blocks of records, the same for any number of processes."""
        return [
            Shard(split, i, -(-count // self.shard_size), range(first, min(first + self.shard_size, count)))
            for split, count in self.records.items()
            for i, first in enumerate(range(0, count, self.shard_size))
        ]

    def check_same(self, other: "Encoding", path: Path) -> None:
        """Raises a UserError that names the first thing in which the shards at `path`, of `other`, differ from this."""
        for name in (known.name for known in fields(self) if known.compare):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise UserError(f"{path} was encoded with {name}={theirs}, but {name}={ours} is asked for")


class Shard(NamedTuple):
    """A block of a split's records, written by one process into one file."""

    split: str
    number: int
    of: int
    """Shards of the split."""
    records: range

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.split}-{self.number:05d}-of-{self.of:05d}.parquet"

    def draws(self, crops: int) -> Iterator[Draw]:
        """What is to be encoded, in the order of the file: crop c is the picture as epoch c of a training sees it."""
        return (Draw(crop, record) for record in self.records for crop in range(crops))


def write_shard(
    folder: Path, shard: Shard, encoding: Encoding, rows: Dataset, codes: UInt[np.ndarray, "n g g"]
) -> None:
    """Writes a file that is there whole or not at all.

    Args:
        folder: of all shards.
        shard: which one it is.
        encoding: what its codes were made by.
        rows: captions and ids of all records of its split.
        codes: of `shard.draws(crops)`, in the `code_type` of the codebook.
    """
    block = rows.select_columns([name for name in ("captions", "id") if name in rows.column_names])
    table = block.select(shard.records).with_format("arrow")[:]
    if "id" not in table.column_names:
        table = table.append_column("id", pa.array([str(record) for record in shard.records]))
    pictures = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), encoding.grid**2)
    first = np.arange(len(shard.records) + 1, dtype=np.int32) * encoding.crops[shard.split]
    table = table.append_column("codes", pa.ListArray.from_arrays(first, pictures))
    with atomic_write(folder / shard.name) as file:
        pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(asdict(encoding))}), file)


def code_type(codebook_size: int) -> np.dtype[Any]:
    """The narrowest type that holds every code: parquet does not mind, but the memory of a reader does."""
    return np.min_scalar_type(codebook_size - 1)


def read_encoding(shard: Path) -> Encoding:
    """What the codes of a shard were made by.

    Raises:
        UserError: if the file is not one of ours.
    """
    try:
        metadata = pq.read_schema(shard).metadata or {}
        return Encoding(**json.loads(metadata[METADATA]))
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{shard} is no shard of codes as `predict` writes them: {error}") from error


def shards_in(folder: Path) -> list[Path]:
    """All shards of a folder that are there, sorted."""
    return sorted(folder.glob("*-of-*.parquet"))


@dataclass(frozen=True, kw_only=True)
class EncodedPictures:
    """Source of pictures that `predict` has encoded: the transformer trains from it as from the pictures themselves.

    Epoch e reads of every picture the crop e modulo the number of crops.
    """

    path: str
    """Folder of the shards."""

    @cached_property
    def encoding(self) -> Encoding:
        """What all shards were made by.

        Raises:
            UserError: if the folder has no shards.
        """
        found = shards_in(Path(self.path).expanduser())
        if not found:
            raise UserError(f"there are no shards of codes in {self.path}: `predict` with a dVAE writes them")
        return read_encoding(found[0])

    @property
    def attribution(self) -> str | None:
        """Of the pictures."""
        return self.encoding.attribution

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """The splits, with the columns codes (crops, g * g), captions and id.

        Raises:
            UserError: if the pictures were of another size, shards are missing, or they do not belong together.
        """
        encoding, folder = self.encoding, Path(self.path).expanduser()
        if image_size != encoding.image_size:
            raise UserError(
                f"the data's image_size is {image_size}, but the pictures of {self.path} were encoded with "
                f"image_size={encoding.image_size}"
            )
        files: dict[str, list[str]] = {}
        for shard in encoding.shards:
            files.setdefault(shard.split, []).append(str(folder / shard.name))
        there = shards_in(folder)
        if len(there) < len(encoding.shards):
            raise UserError(
                f"{self.path} has {len(there)} of {len(encoding.shards)} shards of codes: the same `predict` started "
                "again writes those that are missing"
            )
        for file in there:
            encoding.check_same(read_encoding(file), file)
        return load_dataset("parquet", data_files=files)

    def check_made_with(self, augmentation: Augmentation | None, filters: Sequence[Filter], seed: int) -> None:
        """Raises a UserError if a run is to filter or augment its pictures otherwise than these were; the seed matters
        where crops were drawn by it.
        """
        ours = {"augmentation": repr(augmentation), "filters": repr(list(filters))}
        if augmentation is not None:
            ours["seed"] = str(seed)
        for name, value in ours.items():
            theirs = str(getattr(self.encoding, name))
            if value != theirs:
                raise UserError(
                    f"the data's {name} is {value}, but the pictures of {self.path} were encoded with {theirs}"
                )

    def check(self, dvae: str, grid: int, codebook_size: int, checkpoint: Path | None) -> None:
        """Raises a UserError if the codes are not of the dVAE in a checkpoint, known by the hash of its weights."""
        for name, ours in (("grid", grid), ("codebook_size", codebook_size)):
            theirs = getattr(self.encoding, name)
            if ours != theirs:
                raise UserError(
                    f"the dVAE in {checkpoint} has {name}={ours}, but the codes in {self.path} have {theirs}"
                )
        if dvae != self.encoding.dvae:
            raise UserError(
                f"the dVAE in {checkpoint} has the weights {dvae[:16]}, but the codes in {self.path} were made by "
                f"the weights {self.encoding.dvae[:16]}"
            )


def needs_pictures(source: object) -> None:
    """Raises a UserError if a source holds codes alone."""
    if isinstance(source, EncodedPictures):
        raise UserError(
            f"this model learns from pictures, but {source.path} holds codes alone: name the source of the pictures"
        )
