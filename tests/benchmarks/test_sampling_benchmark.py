"""Benchmark of sampling: lower bounds of a step, and the order of measurements."""

import pytest

from benchmarks.sampling import Size, measure_ours, median_seconds


def test_each_batch_size_is_recorded_with_its_lower_bounds() -> None:
    size = Size(n_embd=16, n_layer=3, n_head=2, text_len=4, text_vocab_size=9, grid=2, codebook_size=5)
    measured = measure_ours(size, batches=(1, 2), rounds=1)
    assert list(measured) == ["1", "2"]
    for batch, figures in measured.items():
        assert figures["codes_per_second"] * figures["step_ms"] == pytest.approx(1000 * int(batch), rel=0.05)
        assert min(figures["lower_bounds"].values()) >= 0
        assert 0 < sum(figures["slowest_operators"].values()) <= 1.01


def test_functions_run_in_turns_after_a_round_of_warm_up() -> None:
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert set(median_seconds(functions, rounds=2)) == {"a", "b"}
    assert calls == ["a", "b"] * 3
