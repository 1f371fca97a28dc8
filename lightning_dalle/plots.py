"""Matplotlib figures of evaluation results and of gradient scales."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def plot_sweep(measured: dict[str, dict[str, Any]], label: str) -> Figure:
    """Plot FID and Inception Score against the numbers that are the keys of `measured`, as in the paper's Fig. 9."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, measure, title in zip(axes, ("fid", "inception_score"), ("FID", "Inception Score"), strict=True):
        values = [(float(x), figures[measure]) for x, figures in measured.items()]
        points = [(x, value["value"], value.get("std") or 0.0) for x, value in values if value["value"] is not None]
        if points:
            axis.errorbar(*zip(*points, strict=True), marker="o", capsize=3)
        else:
            axis.text(0.5, 0.5, "not measured:\nthese Inception weights\nlack the last layer", ha="center", va="center")
        axis.set(xlabel=label, title=title)
    return figure


def plot_scores(measured: dict[str, dict[str, Any]]) -> Figure:
    """Plot the best candidate's mean score, with its 95 % interval, against the numbers of candidates in `measured`."""
    figure = Figure(figsize=(4, 3.2), layout="constrained")
    axis = figure.subplots()
    scores = {int(num_candidates): values["score"] for num_candidates, values in measured.items()}
    means = [score["value"] for score in scores.values()]
    intervals = [score["ci95"] or (score["value"],) * 2 for score in scores.values()]
    axis.errorbar(list(scores), means, np.abs(np.transpose(intervals) - means), marker="o", capsize=3)
    axis.set(xlabel="candidates", title="score of the best", xscale="log")
    return figure


def plot_gradient_scales(curves: dict[int, list[float]]) -> Figure:
    """Plot each resblock's gradient scale over training, dark violet for the first block, as in the paper's Fig. 12.

    `curves` maps the number of an update to the base-2 logarithms of the scales, in the order of the resblocks.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    resblocks = list(zip(*curves.values(), strict=True))
    axis.set_prop_cycle(color=colormaps["viridis"].resampled(len(resblocks)).colors)  # type: ignore[attr-defined]
    for log2 in resblocks:
        axis.plot(list(curves), log2)
    axis.set(xlabel="updates", ylabel="base-2 logarithm of the gradient scale")
    return figure
