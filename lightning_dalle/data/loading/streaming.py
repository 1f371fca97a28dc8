"""Streamed records: split between readers without overlap, shuffled, and gone on with exactly where they were left.

Knows shards and seeds. Knows nothing of pictures, captions or tensors.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import IterableDataset
from torch import distributed
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_dalle.errors import UserError

Record = Mapping[str, Any]

CHUNK = 32
"""Records that are taken from `datasets` at once."""


class Position(NamedTuple):
    """Where a reader is. The library's own shuffle buffer is lost on a resume; this one is filled again, from where it
    was filled, and what was drawn of it is passed over.
    """

    epoch: int = 0
    """Passes over the data that are behind it."""
    unit: int = 0
    record: int = 0
    """Of the buffer's first record: the unit among the reader's, and the number in its shard."""
    drawn: int = 0
    """Records of the buffer that are behind it."""


class Reader:
    """The records that one of several readers takes from a streamed split, pass after pass.

    In every pass each record goes to exactly one reader. Shards are dealt out in an order that changes with the pass.
    Where there are fewer shards than readers, several read the same shard and each takes every so-manieth record of it:
    still each record once, but a shard is read more than once.

    Args:
        rows: the split.
        index: of this reader.
        count: readers there are, those of all processes.
        seed: of the order of shards and records; none keeps the order that they are stored in.
        buffer: records that are held, undecoded, and drawn from at random before the next are read.
    """

    def __init__(self, rows: IterableDataset, index: int, count: int, seed: int | None, buffer: int) -> None:
        self.rows, self.index, self.count, self.seed, self.buffer = rows, index, count, seed, buffer
        self.position = Position()

    @property
    def patience(self) -> int:
        """Passes after which this reader has met every record: alone it reads them all in one; of several, each is
        dealt another share in every pass, and misses a given shard in so many with a probability of 1 in 20,000.
        """
        return 1 if self.count == 1 else 10 * self.count

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Records, each with the number of its pass, without end; `position` is that after the last one.

        Raises:
            UserError: if there is nothing for this reader, pass after pass.
        """
        empty = 0
        while True:
            before = self.position
            for record in self.one_pass():
                yield self.position.epoch, record
            empty = empty + 1 if self.position == before == Position(before.epoch) else 0
            if empty == self.patience:
                raise UserError(
                    f"the streamed data has {self.rows.num_shards} shards and is read by {self.count} readers "
                    f"(num_workers times processes), but has no record for reader {self.index}"
                )
            self.position = Position(self.position.epoch + 1)

    def one_pass(self) -> Iterator[Record]:
        """What is left of the pass that the position is in."""
        epoch, _, _, drawn = self.position
        rows = self._rows(*self.position[:3])
        while block := list(itertools.islice(rows, self.buffer)):
            unit, record, _ = block[0]
            if self.seed is not None:
                random.Random(f"{self.seed} {epoch} {self.index} {unit} {record}").shuffle(block)
            for i in range(drawn, len(block)):
                self.position = Position(epoch, unit, record, i + 1)
                yield block[i][2]
            drawn = 0

    def _rows(self, epoch: int, unit: int, record: int) -> Iterator[tuple[int, int, Record]]:
        """Unit, number and content of the records of a pass from one of them on, in the order that they are read in."""
        for place, (shard, first, step) in enumerate(self._units(epoch)[unit:], start=unit):
            skipped = record if place == unit else 0
            for number, row in enumerate(self._shard(shard, skipped), start=skipped):
                if number % step == first:
                    yield place, number, row if row.get("id") else {**row, "id": f"{shard}-{number}"}

    def _units(self, epoch: int) -> list[tuple[int, int, int]]:
        """This reader's shards in a pass, each with the first and the step of the records that it takes there."""
        sharers = math.ceil(self.count / self.rows.num_shards)
        units = [(shard, first, sharers) for first in range(sharers) for shard in range(self.rows.num_shards)]
        if self.seed is not None:
            random.Random(f"{self.seed} {epoch}").shuffle(units)
        return units[self.index :: self.count]

    def _shard(self, shard: int, skipped: int) -> Iterator[Record]:
        rows = self.rows.shard(self.rows.num_shards, shard)
        # By `iter`, which unlike `__iter__` does not deal out the one shard among the workers once more.
        for chunk in (rows.skip(skipped) if skipped else rows).iter(CHUNK):
            columns = list(chunk)
            for values in zip(*chunk.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


class Stream:
    """Several readers as one: of which the next record comes is drawn by their weights.

    Args:
        readers: one for each source.
        weights: how often each is drawn.
        seed: of the choice.
    """

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float], seed: int) -> None:
        self.readers, self.weights, self.seed = readers, weights, seed
        self.choices = 0

    def __iter__(self) -> Iterator[tuple[int, int, Record]]:
        """Records without end, each with the number of its source and of that source's pass."""
        records = [iter(reader) for reader in self.readers]
        while True:
            source = self._choice() if len(records) > 1 else 0
            self.choices += 1
            yield source, *next(records[source])

    def _choice(self) -> int:
        rng = random.Random(f"{self.seed} {self.readers[0].index} {self.choices}")
        return rng.choices(range(len(self.readers)), self.weights)[0]

    def state_dict(self) -> dict[str, Any]:
        """Where it is, in numbers."""
        return {"choices": self.choices, "positions": [list(reader.position) for reader in self.readers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes there."""
        self.choices = state["choices"]
        for reader, position in zip(self.readers, state["positions"], strict=True):
            reader.position = Position(*position)


class StreamLoader(StatefulDataLoader[Any]):
    """Its state has the places of all processes, and each goes on at its own.

    Lightning asks every process for the state of its loader, but writes down that of the first alone and gives it to
    all. For rows that is enough, since all are as far as one another; of a stream each reads its own shards, and passes
    over what is rejected there.
    """

    def state_dict(self) -> dict[str, Any]:
        """Where each process is; all have to ask for it at once, as they do for a checkpoint."""
        places: list[Any] = [super().state_dict()]
        if distributed.is_initialized():
            own, places = places[0], [None] * distributed.get_world_size()
            distributed.all_gather_object(places, own)
        return {"processes": places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the place of this process with the next iteration.

        Raises:
            UserError: if there were more processes, or fewer.
        """
        places = state_dict["processes"]
        is_shared = distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_shared else (0, 1)
        if len(places) != world:
            raise UserError(
                f"the checkpoint's stream was read by {len(places)} processes, but this run has {world}, which cannot "
                "go on where those were"
            )
        super().load_state_dict(places[rank])
