"""The best of many candidates, and no more of them in memory than are kept."""

from collections.abc import Iterator

import pytest
import torch
from shrunk import Redness
from torch import Tensor

from lightning_dalle.errors import UserError
from lightning_dalle.inference.rerank import best_first, best_of, scored

REDNESS = [0.2, 0.9, 0.1, 0.9, 0.5]


def images() -> Iterator[Tensor]:
    for red in REDNESS:
        yield torch.full((3, 2, 2), red)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_candidates_are_scored_in_order_whatever_the_batch(batch_size: int) -> None:
    found = list(scored(images(), "a cat", Redness(), batch_size))
    assert [candidate.number for candidate in found] == [0, 1, 2, 3, 4]
    assert [candidate.score for candidate in found] == pytest.approx(REDNESS)


def test_the_best_come_first_and_of_two_equal_ones_the_earlier() -> None:
    best = best_first(scored(images(), "a cat", Redness(), 2), top=3)
    assert [candidate.number for candidate in best] == [1, 3, 4]


def test_without_a_scorer_they_stay_in_order() -> None:
    found = best_first(scored(images(), "a cat", None), top=5)
    assert [candidate.number for candidate in found] == [0, 1, 2, 3, 4]
    assert {candidate.score for candidate in found} == {None}


def test_nested_sets_are_the_first_candidates() -> None:
    nested = dict(best_of(scored(images(), "a cat", Redness(), 2), (1, 2, 3, 5)))
    assert {size: candidate.number for size, candidate in nested.items()} == {1: 0, 2: 1, 3: 1, 5: 1}


def test_no_more_images_are_alive_than_two_batches_and_what_is_kept() -> None:
    alive = 0
    most = 0

    class Counted:
        """What a tensor of an image costs."""

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
            image.cost = Counted()  # type: ignore[attr-defined]
            yield image

    best_first(scored(many(), "a cat", Redness(), batch_size=8), top=4)
    assert most <= 2 * 8 + 4


class NoNumber:
    def score(self, images: Tensor, caption: str) -> Tensor:
        return torch.full((len(images),), torch.nan)


def test_scores_that_are_no_numbers_rank_nothing() -> None:
    with pytest.raises(UserError, match=r"NoNumber gives scores of 'a cat' that are no numbers"):
        list(scored(images(), "a cat", NoNumber()))
