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
