"""Readers of streamed data, which divide the shards among workers and resume from the exact record.

`ShardReader` reads one worker's records of one source. `MixedStream` mixes several sources.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import IterableDataset

from lightning_dalle.errors import UserError

Record = Mapping[str, Any]

CHUNK_SIZE = 32
"""Number of records taken from `datasets` at once."""


class StreamPosition(NamedTuple):
    """Position of a `ShardReader`: the first record of its shuffle buffer, and how many of the buffer it has yielded.

    A resumed `ShardReader` fills its buffer from the same record and shuffles it alike; `datasets` would lose it.
    """

    epoch: int = 0
    """Number of complete passes through the data."""
    slice_index: int = 0
    """Index, among the reader's slices (every n-th record of a shard), of the slice with the buffer's first record."""
    record: int = 0
    """Index in its shard of the buffer's first record."""
    num_yielded: int = 0
    """Number of the buffer's records already yielded."""


@dataclass
class ShardReader:
    """Reader of one worker's records of a streamed split; in every pass each record goes to exactly one reader.

    The order in which shards are assigned to readers differs between passes. If there are fewer shards than readers,
    several readers read the same shard, and each keeps every n-th record.
    """

    rows: IterableDataset
    index: int
    num_readers: int
    """Number of readers over all workers and ranks."""
    seed: int | None
    """Seed of the order of shards and records. None keeps the stored order."""
    buffer_size: int
    """Number of undecoded records in the shuffle buffer, which is refilled only when empty."""
    position: StreamPosition = field(default_factory=StreamPosition)

    @property
    def max_empty_passes(self) -> int:
        """Number of passes without a usable record after which the data are taken to contain none.

        A single reader sees all data in one pass. One of n readers gets other shards in each pass, and misses a given
        shard in 10 n passes with a probability below 1 in 20,000.
        """
        return 1 if self.num_readers == 1 else 10 * self.num_readers

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Yield (number of the pass, record) without end, and set `position` to the last record yielded."""
        empty_passes = 0
        while True:
            before = self.position
            for record in self.one_pass():
                yield self.position.epoch, record
            is_empty = self.position == before == StreamPosition(before.epoch)
            empty_passes = empty_passes + 1 if is_empty else 0
            if empty_passes == self.max_empty_passes:
                raise UserError(
                    f"reader {self.index} of {self.num_readers} (data.num_workers times processes) found no record in "
                    f"the {self.rows.num_shards} shards of the streamed data; reduce data.num_workers or the processes"
                )
            self.position = StreamPosition(self.position.epoch + 1)

    def one_pass(self) -> Iterator[Record]:
        """Yield the records of the current pass that were not yielded yet."""
        epoch, _, _, num_yielded = self.position
        rows = self._rows(*self.position[:3])
        while buffer := list(itertools.islice(rows, self.buffer_size)):
            slice_index, record, _ = buffer[0]
            if self.seed is not None:
                random.Random(f"{self.seed} {epoch} {self.index} {slice_index} {record}").shuffle(buffer)
            for i in range(num_yielded, len(buffer)):
                self.position = StreamPosition(epoch, slice_index, record, i + 1)
                yield buffer[i][2]
            num_yielded = 0

    def _rows(self, epoch: int, first_slice: int, first_record: int) -> Iterator[tuple[int, int, Record]]:
        """Yield (slice index, index in the shard, record) of a pass, unshuffled, starting with a given record."""
        for index, (shard, first, step) in enumerate(self._slices(epoch)[first_slice:], start=first_slice):
            skipped = first_record if index == first_slice else 0
            for number, row in enumerate(self._shard(shard, skipped), start=skipped):
                if number % step == first:
                    yield index, number, row if row.get("id") else {**row, "id": f"{shard}-{number}"}

    def _slices(self, epoch: int) -> list[tuple[int, int, int]]:
        """Return the slices of this reader in a pass, each as (shard, first record, step)."""
        step = math.ceil(self.num_readers / self.rows.num_shards)
        slices = [(shard, first, step) for first in range(step) for shard in range(self.rows.num_shards)]
        if self.seed is not None:
            random.Random(f"{self.seed} {epoch}").shuffle(slices)
        return slices[self.index :: self.num_readers]

    def _shard(self, shard: int, skipped: int) -> Iterator[Record]:
        rows = self.rows.shard(self.rows.num_shards, shard)
        # `__iter__` would split this shard among the workers once more; `iter` does not.
        for chunk in (rows.skip(skipped) if skipped else rows).iter(CHUNK_SIZE):
            for values in zip(*chunk.values(), strict=True):
                yield dict(zip(chunk, values, strict=True))


@dataclass
class MixedStream:
    """Stream of records of several sources; the source of each record is sampled in proportion to the weights."""

    readers: Sequence[ShardReader]
    weights: Sequence[float]
    seed: int
    num_records: int = 0
    """Number of records already yielded."""

    def __iter__(self) -> Iterator[tuple[int, int, Record]]:
        """Yield (source, number of the pass through that source, record) without end."""
        records = [iter(reader) for reader in self.readers]
        while True:
            rng = random.Random(f"{self.seed} {self.readers[0].index} {self.num_records}")
            [source] = rng.choices(range(len(self.readers)), self.weights)
            self.num_records += 1
            yield source, *next(records[source])

    def state_dict(self) -> dict[str, Any]:
        return {"num_records": self.num_records, "positions": [list(reader.position) for reader in self.readers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_records = state["num_records"]
        for reader, position in zip(self.readers, state["positions"], strict=True):
            reader.position = StreamPosition(*position)
