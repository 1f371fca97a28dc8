"""Several sources as one."""

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from forms import pairs, parquet_of_bytes, squares, tars

from lightning_dalle.data.loading.samplers import MixedDraws
from lightning_dalle.data.sources.captioned import CaptionedPictures
from lightning_dalle.data.sources.mixture import Mixture
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.errors import UserError

ROWS = Dataset.from_dict({"source": [0] * 10 + [1] * 40})


def draws(epoch: int, weights: list[float], replicas: int = 1) -> list[tuple[int, int]]:
    """Of all processes, as (pass, record)."""
    drawn = []
    for rank in range(replicas):
        sampler = MixedDraws(ROWS, weights, num_replicas=replicas, rank=rank, seed=0, drop_last=True)
        sampler.set_epoch(epoch)
        drawn += [(int(draw.epoch), int(draw.record)) for draw in sampler]
    return drawn


def test_an_epoch_is_as_many_draws_as_there_are_records_in_the_proportion_of_the_weights() -> None:
    for epoch in range(3):
        drawn = draws(epoch, [1.0, 1.0])
        assert len(drawn) == 50
        assert sum(record < 10 for _, record in drawn) == 25
    assert draws(0, [1.0, 1.0]) == draws(0, [1.0, 1.0]) != draws(1, [1.0, 1.0])


def test_of_each_source_every_record_comes_once_before_any_comes_again() -> None:
    every = [draw for epoch in range(8) for draw in draws(epoch, [1.0, 1.0])]
    counts = Counter(every)
    assert set(counts.values()) == {1}
    assert {n for (n, record) in counts if record < 10} == set(range(20))
    assert {n for (n, record) in counts if record >= 10} == set(range(5))


def test_processes_share_the_draws() -> None:
    assert sorted(draws(3, [1.0, 3.0], replicas=2)) == sorted(draws(3, [1.0, 3.0]))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_forms_mix(streamed: bool, tmp_path: Path) -> None:
    tars(tmp_path / "a", {"train": squares(9), "val": squares(3, first=9)})
    parquet_of_bytes(tmp_path / "b", {"train": squares(5, first=20), "val": squares(3, first=25)})
    sources = [CaptionedPictures(path=str(tmp_path / name), streamed=streamed) for name in "ab"]
    splits = Mixture(sources=sources, weights=[1.0, 2.0]).load(32)
    assert {name: sum(1 for _ in split) for name, split in splits.items()} == {"train": 14, "val": 6}


def test_emoji_mix_with_pictures(tmp_path: Path) -> None:
    pairs(tmp_path, {"train": squares(3), "val": squares(2)})
    mixture = Mixture(sources=[OpenMoji(), CaptionedPictures(path=str(tmp_path))], weights=[9.0, 1.0])
    train = mixture.load(32)["train"]
    assert train[-1]["source"] == 1
    assert train[-1]["captions"] == squares(3)[-1].captions


def test_the_attributions_of_all_sources_are_the_mixture_s(tmp_path: Path) -> None:
    photos = CaptionedPictures(path=str(tmp_path))
    assert Mixture(sources=[photos, OpenMoji(), OpenMoji()], weights=[1.0] * 3).attribution == OpenMoji.attribution
    assert Mixture(sources=[photos], weights=[1.0]).attribution is None


class Codes:
    def load(self, image_size: int) -> DatasetDict:
        return DatasetDict({"train": Dataset.from_dict({"captions": [["a"]], "id": ["0"], "codes": [[[1]]]})})


def test_codes_do_not_mix() -> None:
    mixture = Mixture(sources=[OpenMoji(), Codes()], weights=[1.0, 1.0])
    with pytest.raises(
        UserError, match=r"a mixture is of pictures, but its source 1 \(from 0\) has captions, id, codes"
    ):
        mixture.load(32)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    pairs(tmp_path / "a", {"train": squares(3), "val": squares(2)})
    sources = [CaptionedPictures(path=str(tmp_path / "a"), streamed=streamed) for streamed in (False, True)]
    with pytest.raises(UserError, match="all to be streamed or none, but 1 of 2 are"):
        Mixture(sources=sources, weights=[1.0, 1.0]).load(32)
    with pytest.raises(UserError, match="a mixture of 2 sources needs as many weights above 0, not"):
        Mixture(sources=sources, weights=[1.0])
    with pytest.raises(UserError, match="no record is kept of the mixture's source 2"):
        MixedDraws(ROWS, [1.0, 1.0, 1.0], num_replicas=1, rank=0)
