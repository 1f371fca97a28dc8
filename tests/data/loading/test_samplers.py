"""The order of an epoch in which look-alikes stand together."""

import itertools

from lightning_dalle.data.loading.samplers import Alike

CAPTIONS = [f"{who} {what} {tone}" for tone in ("light", "dark") for what in ("surfing", "rowing", "biking")
            for who in ("man", "woman")]  # fmt: skip


def records(epoch: int = 0, rank: int = 0, world: int = 1) -> list[int]:
    sampler = Alike(CAPTIONS, 4, num_replicas=world, rank=rank, seed=3, drop_last=True)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return [int(draw.record) for draw in sampler]


def test_an_epoch_is_every_record_once_in_another_order() -> None:
    first, second = records(), records(epoch=1)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first == records()


def test_what_shares_its_rarest_word_stands_together() -> None:
    """Each sport has four captions, so all but the two runs that the epoch begins its cutting with are of one sport."""
    sampler = Alike(CAPTIONS, 4, num_replicas=1, rank=0)
    sports = [CAPTIONS[record].split()[1] for record in sampler.sorted]
    assert sports == ["biking"] * 4 + ["rowing"] * 4 + ["surfing"] * 4
    place = {record: i for i, record in enumerate(sampler.sorted)}
    order = [place[int(draw.record)] for draw in sampler]
    assert sum(b - a == 1 for a, b in itertools.pairwise(order)) >= 8


def test_processes_share_the_runs() -> None:
    whole = records()
    assert records(rank=0, world=2) == whole[::2]
    assert records(rank=1, world=2) == whole[1::2]
