"""Mixtures of sources: proportions, order, columns and mistakes."""

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from forms import pairs, parquet_of_bytes, squares, tars

from lightning_dalle.data.loading.samplers import MixtureSampler
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.data.sources.mixture import Mixture
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.errors import UserError

ROWS = Dataset.from_dict({"source": [0] * 10 + [1] * 40})


def mixture_indices(epoch: int, weights: list[float], replicas: int = 1) -> list[tuple[int, int]]:
    """Return the samples of all ranks as (pass, record)."""
    indices = []
    for rank in range(replicas):
        sampler = MixtureSampler(ROWS, weights, num_replicas=replicas, rank=rank, seed=0, drop_last=True)
        sampler.set_epoch(epoch)
        indices += [(int(index.epoch), int(index.record)) for index in sampler]
    return indices


def test_an_epoch_has_the_size_of_all_sources_and_the_proportion_of_the_weights() -> None:
    for epoch in range(3):
        indices = mixture_indices(epoch, [1.0, 1.0])
        assert len(indices) == 50
        assert sum(record < 10 for _, record in indices) == 25
    assert mixture_indices(0, [1.0, 1.0]) == mixture_indices(0, [1.0, 1.0]) != mixture_indices(1, [1.0, 1.0])


def test_every_record_of_a_source_is_used_once_before_any_is_repeated() -> None:
    every = [index for epoch in range(8) for index in mixture_indices(epoch, [1.0, 1.0])]
    counts = Counter(every)
    assert set(counts.values()) == {1}
    assert {n for (n, record) in counts if record < 10} == set(range(20))
    assert {n for (n, record) in counts if record >= 10} == set(range(5))


def test_ranks_partition_the_samples() -> None:
    assert sorted(mixture_indices(3, [1.0, 3.0], replicas=2)) == sorted(mixture_indices(3, [1.0, 3.0]))


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_different_formats_mix(streaming: bool, tmp_path: Path) -> None:
    tars(tmp_path / "a", {"train": squares(9), "val": squares(3, first=9)})
    parquet_of_bytes(tmp_path / "b", {"train": squares(5, first=20), "val": squares(3, first=25)})
    sources = [CaptionedImages(path=str(tmp_path / name), streaming=streaming) for name in "ab"]
    splits = Mixture(sources=sources, weights=[1.0, 2.0]).load(32)
    assert {name: sum(1 for _ in split) for name, split in splits.items()} == {"train": 14, "val": 6}


def test_emoji_mix_with_photos(tmp_path: Path) -> None:
    pairs(tmp_path, {"train": squares(3), "val": squares(2)})
    mixture = Mixture(sources=[OpenMoji(), CaptionedImages(path=str(tmp_path))], weights=[9.0, 1.0])
    train = mixture.load(32)["train"]
    assert train[-1]["source"] == 1
    assert train[-1]["captions"] == squares(3)[-1].captions


def test_a_mixture_has_the_attributions_of_all_sources(tmp_path: Path) -> None:
    photos = CaptionedImages(path=str(tmp_path))
    assert Mixture(sources=[photos, OpenMoji(), OpenMoji()], weights=[1.0] * 3).attribution == OpenMoji.attribution
    assert Mixture(sources=[photos], weights=[1.0]).attribution is None


class Codes:
    def load(self, image_size: int) -> DatasetDict:
        return DatasetDict({"train": Dataset.from_dict({"captions": [["a"]], "id": ["0"], "codes": [[[1]]]})})


def test_codes_do_not_mix() -> None:
    mixture = Mixture(sources=[OpenMoji(), Codes()], weights=[1.0, 1.0])
    with pytest.raises(UserError, match=r"source 1 of the mixture .* has no column image, .*codes: mix sources of"):
        mixture.load(32)


def test_a_source_without_train_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path, {"val": squares(2)})
    mixture = Mixture(
        sources=[OpenMoji(), CaptionedImages(path=str(tmp_path), splits={"val": "validation"})], weights=[1.0, 1.0]
    )
    with pytest.raises(
        UserError, match=r"source 1 of the mixture .* has no split train: set its `splits` to {train: NAME}"
    ):
        mixture.load(32)


def test_inconsistent_sources_and_weights_are_refused(tmp_path: Path) -> None:
    pairs(tmp_path / "a", {"train": squares(3), "val": squares(2)})
    sources = [CaptionedImages(path=str(tmp_path / "a"), streaming=streaming) for streaming in (False, True)]
    with pytest.raises(UserError, match="1 of the mixture's 2 sources are streamed; set the same `streaming`"):
        Mixture(sources=sources, weights=[1.0, 1.0]).load(32)
    with pytest.raises(UserError, match=r"a mixture of 2 sources needs 2 weights above 0, but weights is \[1.0\]"):
        Mixture(sources=sources, weights=[1.0])
    with pytest.raises(
        UserError, match=r"reject all records of source 2 of the mixture .*; loosen data.filters or remove the source"
    ):
        MixtureSampler(ROWS, [1.0, 1.0, 1.0], num_replicas=1, rank=0)
