"""Curves that a person looks at.

Knows numbers and matplotlib. Knows nothing of how they were measured.
"""

from typing import Any

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
