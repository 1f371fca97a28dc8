"""The forms of attention are measured beside causal SDPA, and drawn."""

import torch

from benchmarks.attention import chart, measure


def test_every_form_is_measured_and_drawn() -> None:
    measured = measure(grid=4, text_len=3, batch=1, dtype=torch.float32, device="cpu", rounds=1)
    assert list(measured) == ["causal", "masked", "row", "column", "conv"]
    assert measured["causal"]["both_of_causal"] == measured["masked"]["both_of_masked"] == 1
    assert all(forms["both_ms"] >= forms["forward_ms"] > 0 for forms in measured.values())
    (axis,) = chart({"fp32": {"4": measured}}).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn["row"] == [measured["row"]["both_of_causal"]]
