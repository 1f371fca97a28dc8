"""The attention benchmark times every kernel and plots the times relative to causal SDPA."""

import torch

from benchmarks.attention import chart, measure


def test_every_kernel_is_measured_and_plotted() -> None:
    measured = measure(grid=4, text_len=3, batch=1, dtype=torch.float32, device="cpu", rounds=1)
    assert list(measured) == ["causal", "dense", "row", "column", "conv"]
    assert measured["causal"]["both_of_causal"] == measured["dense"]["both_of_dense"] == 1
    assert all(kernel["both_ms"] >= kernel["forward_ms"] > 0 for kernel in measured.values())
    (axis,) = chart({"fp32": {"4": measured}}).axes
    plotted = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert plotted["row"] == [measured["row"]["both_of_causal"]]
