"""How sure a figure is.

Knows numbers. Knows nothing of what was measured.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share of hits with its 95 % interval (Wilson)."""
    return share_of(sum(hits), len(hits))


def share_of(hits: int, count: int) -> dict[str, Any]:
    """The same, of a number of hits."""
    test = binomtest(hits, count).proportion_ci(method="wilson")
    return {
        "value": round(hits / count, 4),
        "interval_95": [round(test.low, 4), round(test.high, 4)],
        "hits": hits,
        "of": count,
    }


def mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its 95 % interval, from the deviation between the values."""
    average = statistics.fmean(values)
    if len(values) < 2:
        return {"value": average, "interval_95": None, "of": len(values)}
    error = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return {"value": average, "interval_95": [average - error, average + error], "of": len(values)}


def mean_of_shares(values: Sequence[float], trials: float) -> dict[str, Any]:
    """A mean of shares with its 95 % interval: Wilson's, of as many hits and misses as would give a mean as sure.

    Those are as many as there are shares, if each is 0 or 1, and more, the less the shares vary.

    Args:
        values: from 0 to 1.
        trials: independent ones behind each share, at least 1; no mean is surer than all of them make it.
    """
    p, count = statistics.fmean(values), len(values)
    variance = statistics.variance(values) if count > 1 else 0.0
    of_one = p * (1 - p)  # the variance of a hit or miss
    sure = count * max(1.0, min(trials, of_one / variance if variance else trials if of_one else 1.0))
    z = 1.96
    middle, width = p + z**2 / (2 * sure), z * math.sqrt(of_one / sure + z**2 / (4 * sure**2))
    interval = [(middle + sign * width) / (1 + z**2 / sure) for sign in (-1, 1)]
    return {"value": round(p, 4), "interval_95": [round(end, 4) for end in interval], "of": count}


def expected_best(values: Sequence[float | bool], scores: Sequence[float], size: int) -> float:
    """The value of the candidate of the best score among `size`, averaged over all sets of so many of the candidates.

    The k-th best of m, from 0, is the best of those sets whose others all come after it: comb(m - 1 - k, size - 1) of
    comb(m, size). So one drawing serves all sizes, and the order of the candidates does not matter but for ties.

    Args:
        values: of each candidate, what is averaged.
        scores: of each candidate, by which it is chosen; of two equal ones the earlier.
        size: of the sets, at most as many as there are candidates.
    """
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
    sets = math.comb(len(scores), size)
    behind = range(len(scores) - 1, -1, -1)
    chances = [math.comb(others, size - 1) / sets for others in behind]  # of whole numbers, as they outgrow floats
    return sum(values[i] * chance for i, chance in zip(best_first, chances, strict=True))


def psnr(squared_errors: Sequence[float]) -> dict[str, Any]:
    """PSNR in dB of the mean squared error over all images, given that of each in [0, 1], with its 95 % interval."""

    def decibel(error: float) -> float:
        return -10 * math.log10(max(error, 1e-10))

    of = mean(squared_errors)
    low, high = of["interval_95"] or (of["value"], of["value"])
    return {
        "value": decibel(of["value"]),
        "interval_95": [decibel(high), decibel(low)],
        "of": "the mean squared error over all pixels of all images in [0, 1]",
    }
