"""What is measured of candidates, by a model that draws given pictures and a scorer that likes red."""

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
from shrunk import Redness
from torch import Tensor

from lightning_dalle.evaluation.openmoji import Emoji, measure_reranking
from lightning_dalle.evaluation.statistics import mean_of_shares
from lightning_dalle.inference.config import Reranking, SamplingOptions
from lightning_dalle.inference.pipeline import Request, TextToImage

CANDIDATES = 5


class Four(Emoji):
    """Flat pictures of rising red: two of `compositions`, two that were trained on."""

    def __init__(self) -> None:
        self.images = torch.zeros(4, 3, 2, 2)
        self.images[:, 0] = torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None]
        self.split_of = ["compositions", "train", "compositions", "train"]
        self.picture, self.tones, self.captions = list("abcd"), ["light", "light", "dark", "dark"], list("ABCD")


class Drawer(TextToImage):
    """Draws one of the emoji by each seed, a little darker."""

    def __init__(self) -> None:
        self.scorer = Redness()

    def draw(  # type: ignore[override]
        self,
        requests: list[Request],
        sampling: SamplingOptions,
        batch_size: int,
        on_progress: Callable[[int, int], None],
    ) -> Iterator[Tensor]:
        for request in requests:
            yield Four().images[self.drawn(request.seed)] - 0.001 * request.seed

    @staticmethod
    def drawn(seed: int) -> int:
        return seed * 7 % 4


def test_the_best_of_all_sets_is_judged() -> None:
    emoji = Four()
    found = measure_reranking(Drawer(), emoji, Reranking(prompts=2, candidates=(1, 3, CANDIDATES)))["by_candidates"]
    asked = [emoji.of("compositions")[i] for i in torch.randperm(2, generator=torch.Generator().manual_seed(0))]
    for size, figures in found.items():
        right, tone = [], []
        for n, i in enumerate(asked):
            seeds = range(n * CANDIDATES, (n + 1) * CANDIDATES)
            best = [
                max(some, key=lambda seed: (Drawer.drawn(seed), -seed))
                for some in itertools.combinations(seeds, int(size))
            ]
            right.append(statistics.fmean(Drawer.drawn(seed) == i for seed in best))
            tone.append(statistics.fmean(emoji.tones[Drawer.drawn(seed)] == emoji.tones[i] for seed in best))
        assert figures["right_skin_tone"] == mean_of_shares(tone, CANDIDATES / int(size))
        assert figures["right_emoji"] == mean_of_shares(right, CANDIDATES / int(size))
    assert found["1"]["score"]["value"] < found["3"]["score"]["value"] < found[str(CANDIDATES)]["score"]["value"]
