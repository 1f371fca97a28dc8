"""Schedules: end points, warm-up, length relative to the fit, and halving on plateaus."""

import pytest

from lightning_dalle.errors import UserError
from lightning_dalle.schedules import CosineAnneal, HalveOnPlateau


def test_cosine_reaches_its_ends_and_stays() -> None:
    temperature = CosineAnneal(start=1.0, end=1 / 16, num_steps=150_000)
    assert temperature(0) == 1.0
    assert temperature(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature(150_000) == temperature(3_000_000) == 1 / 16


def test_cosine_can_rise() -> None:
    kl_weight = CosineAnneal(start=0.0, end=6.6, num_steps=5000)
    values = [kl_weight(step) for step in range(5001)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 6.6)


def test_warm_up_is_linear_from_zero() -> None:
    rate = CosineAnneal(start=4.5e-4, end=0.0, num_steps=20_000, warmup_steps=5000)
    assert [rate(step) for step in (0, 2500, 5000, 20_000)] == pytest.approx([0.0, 2.25e-4, 4.5e-4, 0.0])


def test_warm_up_longer_than_the_schedule_is_refused() -> None:
    with pytest.raises(UserError, match=r"warmup_steps is 10: set it to at least 0 and below its num_steps=10"):
        CosineAnneal(start=1.0, end=0.0, num_steps=10, warmup_steps=10)


def test_without_num_steps_a_schedule_lasts_for_its_fraction_of_the_fit() -> None:
    temperature = CosineAnneal(start=1.0, end=0.5, fraction=0.7).for_max_steps(8500)
    assert [temperature(step) for step in (0, 2975, 5950, 8500)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    whole = CosineAnneal(start=1.0, end=0.1, warmup_steps=100).for_max_steps(1000)
    assert [whole(step) for step in (50, 100, 1000, 2000)] == pytest.approx([0.5, 1.0, 0.1, 0.1])


def test_given_num_steps_are_kept() -> None:
    schedule = CosineAnneal(start=1.0, end=0.5, num_steps=100, fraction=0.7)
    assert schedule.for_max_steps(8500) == schedule


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 150])
def test_warm_up_is_at_most_half_of_a_short_fit(steps: int) -> None:
    rate = CosineAnneal(start=1.0, end=0.1, warmup_steps=100).for_max_steps(steps)
    assert max(rate(step) for step in range(steps)) == rate(steps // 2) == 1.0
    assert rate(steps) == pytest.approx(0.1)


@pytest.mark.parametrize("fraction", [0.0, 70.0])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=f"fraction is {fraction}: set it above 0 and at most 1"):
        CosineAnneal(start=1.0, end=0.0, fraction=fraction)


def test_a_fit_without_max_steps_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"whose number of steps is unknown: set trainer.max_steps, or the schedule's num_steps"
    ):
        CosineAnneal(start=1.0, end=0.0).for_max_steps(-1)


def test_the_papers_rate_is_halved_on_plateaus_at_most_five_times() -> None:
    rate = HalveOnPlateau(peak=4.5e-4, warmup_steps=5000, patience=2)
    assert [rate(step) for step in (0, 2500, 5000, 430_000)] == pytest.approx([0.0, 2.25e-4, 4.5e-4, 4.5e-4])
    rates = []
    for loss in [3.0, 2.0, 2.5, 1.9999, *[2.0] * 20]:  # the fourth is lower by less than a thousandth
        rate.step(loss)
        rates.append(rate(10_000) / 4.5e-4)
    assert rates[:8] == [1, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8]
    assert rates[-1] == 1 / 32


def test_a_better_loss_resets_the_patience() -> None:
    rate = HalveOnPlateau(peak=1.0, patience=2)
    for loss in (3.0, 3.0, 2.0, 2.0):
        rate.step(loss)
    assert rate(0) == 1.0


def test_state_is_restored() -> None:
    rate, other = HalveOnPlateau(peak=1.0, patience=2), HalveOnPlateau(peak=1.0, patience=2)
    for loss in (3.0, 3.0, 3.0, 3.0):
        rate.step(loss)
    other.load_state_dict(rate.state_dict())
    for each in (rate, other):
        each.step(3.0)
    assert rate(0) == other(0) == 0.25


@pytest.mark.parametrize(
    ("name", "value", "least"), [("warmup_steps", -1, 0), ("max_reductions", -1, 0), ("patience", 0, 1)]
)
def test_a_value_below_its_minimum_is_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}: set it to at least {least}"):
        HalveOnPlateau(peak=1.0, **{name: value})
