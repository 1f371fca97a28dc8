"""Intervals."""

import pytest
import torch

from lightning_dalle.evaluation.statistics import mean, psnr, share


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
