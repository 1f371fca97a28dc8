"""Best of N: order of candidates, nested sets, averages over subsets, and memory."""

import itertools
import random
import statistics
from collections.abc import Iterator

import pytest
import torch
from shrunk import Redness
from torch import Tensor

from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import check_candidates
from lightning_dalle.inference.rerank import best_of_n, expected_best_of_n, rerank, score_candidates

REDNESS = [0.2, 0.9, 0.1, 0.9, 0.5]


def images() -> Iterator[Tensor]:
    for red in REDNESS:
        yield torch.full((3, 2, 2), red)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_candidates_are_scored_in_order_for_any_batch_size(batch_size: int) -> None:
    found = list(score_candidates(images(), "a cat", Redness(), batch_size))
    assert [candidate.number for candidate in found] == [0, 1, 2, 3, 4]
    assert [candidate.score for candidate in found] == pytest.approx(REDNESS)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_reranking_sorts_by_score_and_ties_by_position(top: int) -> None:
    best = rerank(score_candidates(images(), "a cat", Redness(), 2), top)
    assert [candidate.number for candidate in best] == [1, 3, 4][:top]


def test_reranking_without_a_scorer_keeps_the_order() -> None:
    found = rerank(score_candidates(images(), "a cat", None), top=5)
    assert [candidate.number for candidate in found] == [0, 1, 2, 3, 4]
    assert {candidate.score for candidate in found} == {None}


def test_best_of_n_is_the_best_of_the_first_n() -> None:
    nested = dict(best_of_n(score_candidates(images(), "a cat", Redness(), 2), (1, 2, 3, 5)))
    assert {size: candidate.number for size, candidate in nested.items()} == {1: 0, 2: 1, 3: 1, 5: 1}


@pytest.mark.parametrize("n", range(1, 9))
def test_expected_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    scores, values = [0.3, 0.9, 0.9, -0.2, 0.5, 0.1, 0.7, 0.3], [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.0]
    best = [max(some, key=lambda i: scores[i]) for some in itertools.combinations(range(8), n)]  # ties: the first
    assert expected_best_of_n(values, scores, n) == pytest.approx(statistics.fmean(values[i] for i in best))


def test_expected_best_of_n_does_not_depend_on_the_order_of_candidates() -> None:
    candidates = [(random.random(), float(i % 2)) for i in range(64)]
    shuffled = random.sample(candidates, 64)
    one, two = (expected_best_of_n([v for _, v in some], [s for s, _ in some], 16) for some in (candidates, shuffled))
    assert one == pytest.approx(two)


def test_expected_best_of_n_counts_more_subsets_than_a_float_can() -> None:
    assert expected_best_of_n([1.0] * 4096, [0.0] * 4096, 512) == pytest.approx(1.0)


def test_at_most_two_batches_and_the_kept_images_are_in_memory() -> None:
    alive = 0
    most = 0

    class Counter:
        """Object that lives as long as an image."""

        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def many() -> Iterator[Tensor]:
        for i in range(100):
            image = torch.full((3, 2, 2), (i * 37 % 100) / 100)
            image.counter = Counter()  # type: ignore[attr-defined]
            yield image

    rerank(score_candidates(many(), "a cat", Redness(), batch_size=8), top=4)
    assert most <= 2 * 8 + 4


class NaNScorer:
    def score(self, images: Tensor, caption: str) -> Tensor:
        return torch.full((len(images),), torch.nan)


def test_nan_scores_raise_an_error() -> None:
    with pytest.raises(UserError, match=r"NaNScorer scores 'a cat' with NaN or infinite values: choose another scorer"):
        list(score_candidates(images(), "a cat", NaNScorer()))


@pytest.mark.parametrize(
    ("candidates", "top", "has_scorer", "message"),
    [
        (0, 1, True, "the number of candidates is 0, but must be at least 1"),
        ((), 1, True, "the number of candidates is none, but must be at least 1"),
        ((4, 1), 1, True, "the number of candidates is 4, 1, but must be at least 1 and in increasing order"),
        ((1, 1), 1, True, "the number of candidates is 1, 1, but .* in increasing order"),
        (4, 5, True, "cannot keep 5 of 4 candidates: top must be from 1 to 4"),
        (4, 0, True, "cannot keep 0 of 4 candidates: top must be from 1 to 4"),
        (4, 1, False, "cannot choose the best 1 of 4 candidates without a scorer: give a CLIP"),
        ((1, 8), 1, False, "cannot choose the best 1 of 8 candidates without a scorer: give a CLIP"),
    ],
)
def test_impossible_numbers_of_candidates_raise_an_error(
    candidates: int | tuple[int, ...], top: int, has_scorer: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_candidates(candidates, top, has_scorer)


@pytest.mark.parametrize(("candidates", "top"), [(1, 1), (4, 4), ((1,), 1)])
def test_all_candidates_can_be_kept_without_a_scorer(candidates: int | tuple[int, ...], top: int) -> None:
    check_candidates(candidates, top, has_scorer=False)
