"""95 % intervals of means and proportions."""

import random

import pytest
import torch

from lightning_dalle.evaluation.statistics import mean, mean_of_proportions, proportion


def test_an_interval_of_95_percent() -> None:
    values = torch.randn(10_000).tolist()
    low, high = mean(values)["ci95"]
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 / 100, rel=0.05)


def test_one_value_has_no_interval() -> None:
    assert mean([2.0]) == {"value": 2.0, "ci95": None, "of": 1}


def test_a_proportion_lies_in_its_interval() -> None:
    found = proportion(40, 100)
    assert (found["value"], found["hits"], found["of"]) == (0.4, 40, 100)
    assert found["ci95"] == [0.3094, 0.498]


@pytest.mark.parametrize("hits", [0, 1, 17, 30])
def test_a_mean_of_hits_and_misses_is_their_proportion(hits: int) -> None:
    one, other = (
        mean_of_proportions([1.0] * hits + [0.0] * (30 - hits), 64.0),
        proportion(hits, 30),
    )
    assert one["value"] == other["value"]
    assert one["ci95"] == pytest.approx(other["ci95"], abs=2e-4)


def test_proportions_that_vary_less_have_a_narrower_interval() -> None:
    """Compare with the usual interval of a mean, which is right away from 0 and 1."""
    values = [random.betavariate(4, 3) for _ in range(400)]
    low, high = mean_of_proportions(values, 64.0)["ci95"]
    assert [low, high] == pytest.approx(mean(values)["ci95"], abs=2e-3)
    assert high - low < 0.6 * (0.5 * 4 / 400**0.5)


@pytest.mark.parametrize("values", [[0.5] * 20, [0.5] * 19 + [0.5001], [0.45, 0.55] * 10])
def test_the_interval_is_no_narrower_than_that_of_all_trials(values: list[float]) -> None:
    most = proportion(40, 80)  # four trials behind each of twenty
    assert mean_of_proportions(values, 4.0)["ci95"] == pytest.approx(most["ci95"], abs=2e-4)
