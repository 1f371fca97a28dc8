"""95 % confidence intervals of means and proportions."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest


def proportion(hits: int, count: int) -> dict[str, Any]:
    """Return the proportion hits / count with Wilson's 95 % interval."""
    test = binomtest(hits, count).proportion_ci(method="wilson")
    return {
        "value": round(hits / count, 4),
        "ci95": [round(test.low, 4), round(test.high, 4)],
        "hits": hits,
        "of": count,
    }


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean with its 95 % interval of 1.96 standard errors; a single value has no interval."""
    average = statistics.fmean(values)
    if len(values) < 2:
        return {"value": average, "ci95": None, "of": len(values)}
    error = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return {"value": average, "ci95": [average - error, average + error], "of": len(values)}


def mean_of_proportions(values: Sequence[float], trials: float) -> dict[str, Any]:
    """Return the mean of proportions with Wilson's 95 % interval for an effective number of trials.

    The effective number is how many independent trials, each 0 or 1, would give a mean of the same variance. It equals
    the number of proportions if each is 0 or 1, and grows as the proportions vary less.

    Args:
        values: proportions, from 0 to 1.
        trials: number of independent trials behind each proportion, at least 1; bounds the effective number.
    """
    p, count = statistics.fmean(values), len(values)
    variance = statistics.variance(values) if count > 1 else 0.0
    of_one = p * (1 - p)  # variance of one hit or miss
    effective = count * max(1.0, min(trials, of_one / variance if variance else trials if of_one else 1.0))
    z = 1.96
    middle, width = p + z**2 / (2 * effective), z * math.sqrt(of_one / effective + z**2 / (4 * effective**2))
    interval = [(middle + sign * width) / (1 + z**2 / effective) for sign in (-1, 1)]
    return {"value": round(p, 4), "ci95": [round(end, 4) for end in interval], "of": count}
