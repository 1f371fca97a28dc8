"""Curves that a person looks at.

Knows numbers and matplotlib. Knows nothing of how they were measured.
"""

from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure


def sweep(measured: dict[str, dict[str, Any]], label: str) -> Figure:
    """FID beside the Inception Score over what was varied, as in the paper's Fig. 9.

    Args:
        measured: by the varied number, the figures of `evaluation.fidelity`.
        label: what was varied.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, measure, title in zip(axes, ("fid", "inception_score"), ("FID", "Inception Score"), strict=True):
        points = [(float(x), values[measure]) for x, values in measured.items()]
        known = [
            (x, value["value"], value.get("deviation") or 0.0) for x, value in points if value["value"] is not None
        ]
        if known:
            axis.errorbar(*zip(*known, strict=True), marker="o", capsize=3)
        else:
            axis.text(0.5, 0.5, "not measured:\nthese Inception weights\nlack the last layer", ha="center", va="center")
        axis.set(xlabel=label, title=title)
    return figure


def scores(measured: dict[str, dict[str, Any]]) -> Figure:
    """The scorer's mean over the number of candidates that it chose among, with its 95 % interval."""
    figure = Figure(figsize=(4, 3.2), layout="constrained")
    axis = figure.subplots()
    points = [(int(size), values["score"]) for size, values in measured.items()]
    middle = [score["value"] for _, score in points]
    spans = [score["interval_95"] or (score["value"],) * 2 for _, score in points]
    around = [[value - low for value, (low, _) in zip(middle, spans, strict=True)],
              [high - value for value, (_, high) in zip(middle, spans, strict=True)]]  # fmt: skip
    axis.errorbar([size for size, _ in points], middle, around, marker="o", capsize=3)
    axis.set(xlabel="candidates", title="score of the best", xscale="log")
    return figure


def gradient_scales(curves: dict[int, list[float]]) -> Figure:
    """The scale of each resblock over the updates, from dark violet for the first to yellow, as in the paper's Fig. 12.

    Args:
        curves: by update, the base-2 logarithms of the scales in the order of the resblocks.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    resblocks = list(zip(*curves.values(), strict=True))
    axis.set_prop_cycle(color=colormaps["viridis"].resampled(len(resblocks)).colors)  # type: ignore[attr-defined]
    for log2 in resblocks:
        axis.plot(list(curves), log2)
    axis.set(xlabel="updates", ylabel="base-2 logarithm of the gradient scale")
    return figure
