"""Order of the records in the samplers."""

import itertools

from lightning_dalle.data.loading.samplers import HardNegativeSampler

CAPTIONS = [f"{who} {what} {tone}" for tone in ("light", "dark") for what in ("surfing", "rowing", "biking")
            for who in ("man", "woman")]  # fmt: skip


def records(epoch: int = 0, rank: int = 0, world_size: int = 1) -> list[int]:
    sampler = HardNegativeSampler(CAPTIONS, 4, num_replicas=world_size, rank=rank, seed=3, drop_last=True)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return [int(index.record) for index in sampler]


def test_every_epoch_of_hard_negatives_has_every_record_once() -> None:
    first, second = records(), records(epoch=1)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first == records()


def test_captions_with_the_same_rarest_word_are_neighbours() -> None:
    """Each sport has four captions, so all groups but the two at the ends have one sport."""
    sampler = HardNegativeSampler(CAPTIONS, 4, num_replicas=1, rank=0)
    sports = [CAPTIONS[record].split()[1] for record in sampler.sorted]
    assert sports == ["biking"] * 4 + ["rowing"] * 4 + ["surfing"] * 4
    place = {record: i for i, record in enumerate(sampler.sorted)}
    order = [place[int(index.record)] for index in sampler]
    assert sum(b - a == 1 for a, b in itertools.pairwise(order)) >= 8


def test_ranks_share_the_groups() -> None:
    expected = records()
    assert records(rank=0, world_size=2) == expected[::2]
    assert records(rank=1, world_size=2) == expected[1::2]
