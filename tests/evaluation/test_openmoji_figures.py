"""Figures of OpenMoji samples, with a model that samples given images and a scorer that prefers red."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from shrunk import Redness
from torch import Tensor

from lightning_dalle.evaluation.openmoji import Emoji, measure_dalle, measure_reranking
from lightning_dalle.evaluation.protocol import Captions, GenerationProtocol, Protocol, RerankingProtocol
from lightning_dalle.evaluation.statistics import mean_of_proportions
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.pipeline import Request, TextToImage

CANDIDATES = 5


class FourEmoji(Emoji):
    """Uniform images of increasing red: two of `compositions`, two of `train`."""

    def __init__(self) -> None:
        self.images = torch.zeros(4, 3, 2, 2)
        self.images[:, 0] = torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None]
        self.split_of = ["compositions", "train", "compositions", "train"]
        self.splits = DatasetDict(compositions=Dataset.from_dict({"captions": [["A"], ["C"]]}))
        self.image_hash, self.tones, self.captions = list("abcd"), ["light", "light", "dark", "dark"], list("ABCD")


class FakeDALLE(TextToImage):
    """Model that returns one of the emoji for each seed, slightly darkened."""

    def __init__(self) -> None:
        self.scorer, self.attribution = Redness(), None

    def sample_images(  # type: ignore[override]
        self,
        requests: list[Request],
        sampling: SamplingConfig,
        batch_size: int,
        on_progress: Callable[[int, int], None],
    ) -> Iterator[Tensor]:
        for request in requests:
            yield FourEmoji().images[self.emoji_of(request.seed)] - 0.001 * request.seed

    @staticmethod
    def emoji_of(seed: int) -> int:
        return seed * 7 % 4


def test_the_nearest_emoji_of_each_sample_is_compared_with_the_prompted_one(tmp_path: Path) -> None:
    emoji, captions = FourEmoji(), Captions(one_per_image=True, count=2)
    protocol = Protocol(name="p", generation=GenerationProtocol(split="compositions", captions=captions))
    figures, prompted, samples = measure_dalle(FakeDALLE(), emoji, protocol, tmp_path)
    assert sorted(prompted) == [0, 2]
    assert prompted == emoji.choose("compositions", captions)
    assert len(samples) == len(list(tmp_path.glob("*.png"))) == 2
    nearest = [FakeDALLE.emoji_of(seed) for seed in (0, 1)]
    assert figures["right_emoji"]["hits"] == sum(i == j for i, j in zip(nearest, prompted, strict=True))
    tones = [(emoji.tones[i], emoji.tones[j]) for i, j in zip(nearest, prompted, strict=True)]
    assert figures["right_skin_tone"]["hits"] == sum(one == other for one, other in tones)


def test_reranking_averages_over_all_subsets_of_the_candidates() -> None:
    emoji, protocol = FourEmoji(), RerankingProtocol(prompts=2, candidates=(1, 3, CANDIDATES))
    found = measure_reranking(FakeDALLE(), emoji, protocol)["by_candidates"]
    prompted = [emoji.indices("compositions")[i] for i in torch.randperm(2, generator=torch.Generator().manual_seed(0))]
    for n, figures in found.items():
        right, tone = [], []
        for position, i in enumerate(prompted):
            seeds = range(position * CANDIDATES, (position + 1) * CANDIDATES)
            best = [
                max(subset, key=lambda seed: (FakeDALLE.emoji_of(seed), -seed))
                for subset in itertools.combinations(seeds, int(n))
            ]
            right.append(statistics.fmean(FakeDALLE.emoji_of(seed) == i for seed in best))
            tone.append(statistics.fmean(emoji.tones[FakeDALLE.emoji_of(seed)] == emoji.tones[i] for seed in best))
        assert figures["right_skin_tone"] == mean_of_proportions(tone, CANDIDATES / int(n))
        assert figures["right_emoji"] == mean_of_proportions(right, CANDIDATES / int(n))
    assert found["1"]["score"]["value"] < found["3"]["score"]["value"] < found[str(CANDIDATES)]["score"]["value"]
