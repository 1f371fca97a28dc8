"""Streams: who reads what, in which order, and where one goes on."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from lightning_dalle.data.loading.streaming import Reader, Stream
from lightning_dalle.errors import UserError


def numbers(count: int, shards: int, first: int = 0) -> IterableDataset:
    rows = Dataset.from_dict({"id": [str(i) for i in range(first, first + count)]})
    return rows.to_iterable_dataset(num_shards=shards)


def ids(records: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(record["id"]) for record in records]


def passes(rows: IterableDataset, count: int, epoch: int, **options: Any) -> list[list[int]]:
    """What each of several readers reads in one pass."""
    read = []
    for index in range(count):
        reader = Reader(rows, index, count, **options)
        reader.position = reader.position._replace(epoch=epoch)
        read.append(ids(list(reader.one_pass())))
    return read


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("readers", [1, 4, 5])
def test_in_every_pass_each_record_goes_to_one_reader(shards: int, readers: int) -> None:
    rows = numbers(83, shards)
    first, second = (passes(rows, readers, epoch, seed=0, buffer=10) for epoch in (0, 1))
    for read in (first, second):
        assert sorted(itertools.chain.from_iterable(read)) == list(range(83))
    assert first != second


def test_without_a_seed_the_order_is_the_stored_one() -> None:
    assert passes(numbers(20, 4), 2, 0, seed=None, buffer=1) == [
        [*range(5), *range(10, 15)],
        [*range(5, 10), *range(15, 20)],
    ]


def test_the_buffer_mixes_records_of_a_shard_and_of_its_neighbours() -> None:
    [read] = passes(numbers(100, 10), 1, 0, seed=0, buffer=50)
    shards = [number // 10 for number in read]
    assert len(set(shards[:50])) == 5
    assert sum(a == b for a, b in itertools.pairwise(shards)) < 20


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_goes_on_wherever_it_was_left(shards: int) -> None:
    def stream() -> Stream:
        parts = [numbers(17, shards), numbers(40, 4, first=100)]
        return Stream([Reader(part, 1, 2, seed=3, buffer=7) for part in parts], [1.0, 3.0], seed=3)

    unbroken = list(itertools.islice(stream(), 100))
    for stop in range(0, 90, 9):
        left, resumed = stream(), stream()
        list(itertools.islice(left, stop))
        resumed.load_state_dict(left.state_dict())
        assert list(itertools.islice(resumed, 10)) == unbroken[stop : stop + 10]


def test_weights_are_the_shares_of_the_sources() -> None:
    parts = [numbers(10, 2), numbers(1000, 2, first=100)]
    stream = Stream([Reader(part, 0, 1, seed=0, buffer=5) for part in parts], [1.0, 3.0], seed=0)
    read = ids([record for _, _, record in itertools.islice(stream, 400)])
    assert 80 < sum(number < 100 for number in read) < 120


def test_a_reader_that_would_wait_for_ever_says_so() -> None:
    with pytest.raises(UserError, match=r"has 1 shards and is read by 3 readers .* has no record for reader 2"):
        next(iter(Reader(numbers(2, 1), 2, 3, seed=None, buffer=5)))


def test_a_reader_that_is_dealt_an_empty_shard_goes_on_with_the_next_pass() -> None:
    rows = numbers(4, 4).filter(lambda id: id != "2", input_columns="id")
    for index in range(4):
        read = itertools.islice(Reader(rows, index, 4, seed=0, buffer=5), 12)
        assert set(ids([record for _, record in read])) == {0, 1, 3}


def test_records_without_an_id_are_called_by_their_place() -> None:
    rows = Dataset.from_dict({"captions": [["a"]] * 4}).to_iterable_dataset(num_shards=2)
    assert [record["id"] for record in Reader(rows, 0, 1, None, 5).one_pass()] == ["0-0", "0-1", "1-0", "1-1"]
