"""Readers of streamed data: which records each reads, in which order, and where it resumes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from lightning_dalle.data.loading.streaming import MixedStream, ShardReader
from lightning_dalle.errors import UserError


def numbers(count: int, shards: int, first: int = 0) -> IterableDataset:
    rows = Dataset.from_dict({"id": [str(i) for i in range(first, first + count)]})
    return rows.to_iterable_dataset(num_shards=shards)


def ids(records: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(record["id"]) for record in records]


def passes(rows: IterableDataset, count: int, epoch: int, **options: Any) -> list[list[int]]:
    """Return the ids that each of `count` readers reads in one pass."""
    read = []
    for index in range(count):
        reader = ShardReader(rows, index, count, **options)
        reader.position = reader.position._replace(epoch=epoch)
        read.append(ids(list(reader.one_pass())))
    return read


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("readers", [1, 4, 5])
def test_every_pass_gives_each_record_to_one_reader(shards: int, readers: int) -> None:
    rows = numbers(83, shards)
    first, second = (passes(rows, readers, epoch, seed=0, buffer_size=10) for epoch in (0, 1))
    for read in (first, second):
        assert sorted(itertools.chain.from_iterable(read)) == list(range(83))
    assert first != second


def test_without_a_seed_records_keep_their_stored_order() -> None:
    assert passes(numbers(20, 4), 2, 0, seed=None, buffer_size=1) == [
        [*range(5), *range(10, 15)],
        [*range(5, 10), *range(15, 20)],
    ]


def test_the_shuffle_buffer_mixes_records_of_several_shards() -> None:
    [read] = passes(numbers(100, 10), 1, 0, seed=0, buffer_size=50)
    shards = [number // 10 for number in read]
    assert len(set(shards[:50])) == 5
    assert sum(a == b for a, b in itertools.pairwise(shards)) < 20


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_resumes_exactly_at_any_record(shards: int) -> None:
    def stream() -> MixedStream:
        parts = [numbers(17, shards), numbers(40, 4, first=100)]
        return MixedStream([ShardReader(part, 1, 2, seed=3, buffer_size=7) for part in parts], [1.0, 3.0], seed=3)

    unbroken = list(itertools.islice(stream(), 100))
    for stop in range(0, 90, 9):
        interrupted, resumed = stream(), stream()
        list(itertools.islice(interrupted, stop))
        resumed.load_state_dict(interrupted.state_dict())
        assert list(itertools.islice(resumed, 10)) == unbroken[stop : stop + 10]


def test_sources_are_read_in_proportion_to_their_weights() -> None:
    parts = [numbers(10, 2), numbers(1000, 2, first=100)]
    stream = MixedStream([ShardReader(part, 0, 1, seed=0, buffer_size=5) for part in parts], [1.0, 3.0], seed=0)
    read = ids([record for _, _, record in itertools.islice(stream, 400)])
    assert 80 < sum(number < 100 for number in read) < 120


def test_a_reader_without_records_raises_an_error() -> None:
    with pytest.raises(
        UserError, match=r"reader 2 of 3 .* found no record in the 1 shards .*; reduce data.num_workers"
    ):
        next(iter(ShardReader(numbers(2, 1), 2, 3, seed=None, buffer_size=5)))


def test_a_reader_skips_an_empty_shard() -> None:
    rows = numbers(4, 4).filter(lambda id: id != "2", input_columns="id")
    for index in range(4):
        read = itertools.islice(ShardReader(rows, index, 4, seed=0, buffer_size=5), 12)
        assert set(ids([record for _, record in read])) == {0, 1, 3}


def test_records_without_an_id_are_named_by_shard_and_number() -> None:
    rows = Dataset.from_dict({"captions": [["a"]] * 4}).to_iterable_dataset(num_shards=2)
    assert [record["id"] for record in ShardReader(rows, 0, 1, None, 5).one_pass()] == ["0-0", "0-1", "1-0", "1-1"]
