"""Intervals, and what is to be expected of the best of several."""

import itertools
import random
import statistics

import pytest
import torch

from lightning_dalle.evaluation.statistics import expected_best, mean, mean_of_shares, psnr, share


def test_an_interval_of_95_percent() -> None:
    values = torch.randn(10_000).tolist()
    low, high = mean(values)["interval_95"]
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 / 100, rel=0.05)


def test_one_value_has_no_interval() -> None:
    assert mean([2.0]) == {"value": 2.0, "interval_95": None, "of": 1}


def test_psnr_is_of_the_mean_error() -> None:
    found = psnr([0.01, 0.03])
    assert found["value"] == pytest.approx(16.9897, abs=1e-3)
    assert found["interval_95"][0] < found["value"] < found["interval_95"][1]


def test_a_share_lies_in_its_interval() -> None:
    found = share([True] * 40 + [False] * 60)
    assert (found["value"], found["hits"], found["of"]) == (0.4, 40, 100)
    assert found["interval_95"] == [0.3094, 0.498]


@pytest.mark.parametrize("hits", [0, 1, 17, 30])
def test_a_mean_of_hits_and_misses_is_their_share(hits: int) -> None:
    one, other = mean_of_shares([1.0] * hits + [0.0] * (30 - hits), 64.0), share([True] * hits + [False] * (30 - hits))
    assert one["value"] == other["value"]
    assert one["interval_95"] == pytest.approx(other["interval_95"], abs=2e-4)


def test_a_mean_of_shares_that_vary_less_is_surer() -> None:
    """As sure as the usual interval of a mean has it, where that is not near its ends."""
    values = [random.betavariate(4, 3) for _ in range(400)]
    low, high = mean_of_shares(values, 64.0)["interval_95"]
    assert [low, high] == pytest.approx(mean(values)["interval_95"], abs=2e-3)
    assert high - low < 0.6 * (0.5 * 4 / 400**0.5)


@pytest.mark.parametrize("values", [[0.5] * 20, [0.5] * 19 + [0.5001], [0.45, 0.55] * 10])
def test_a_mean_of_shares_is_no_surer_than_all_trials(values: list[float]) -> None:
    most = share([True, False] * 40)  # four trials behind each of twenty
    assert mean_of_shares(values, 4.0)["interval_95"] == pytest.approx(most["interval_95"], abs=2e-4)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_best_is_expected_as_over_all_sets(size: int) -> None:
    scores, values = [0.3, 0.9, 0.9, -0.2, 0.5, 0.1, 0.7, 0.3], [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.0]
    best = [max(some, key=lambda i: scores[i]) for some in itertools.combinations(range(8), size)]  # the earlier
    assert expected_best(values, scores, size) == pytest.approx(statistics.fmean(values[i] for i in best))


def test_what_is_expected_does_not_hang_on_the_order() -> None:
    candidates = [(random.random(), float(i % 2)) for i in range(64)]
    shuffled = random.sample(candidates, 64)
    one, two = (expected_best([v for _, v in some], [s for s, _ in some], 16) for some in (candidates, shuffled))
    assert one == pytest.approx(two)


def test_sets_may_be_more_than_a_float_can_count() -> None:
    assert expected_best([1.0] * 4096, [0.0] * 4096, 512) == pytest.approx(1.0)
