"""Sampling is measured beside the floor of its weights and products."""

import pytest

from benchmarks.sampling import Size, medians, ours


def test_each_batch_is_measured_beside_its_floor() -> None:
    size = Size(n_embd=16, n_layer=3, n_head=2, text_len=4, text_vocab_size=9, grid=2, codebook_size=5)
    measured = ours(size, batches=(1, 2), rounds=1)
    assert list(measured) == ["1", "2"]
    for batch, of in measured.items():
        assert of["codes_per_second"] * of["step_ms"] == pytest.approx(1000 * int(batch), rel=0.05)
        assert min(of["floor"].values()) >= 0
        assert 0 < sum(of["shares"].values()) <= 1.01


def test_runs_take_turns_and_the_first_of_each_does_not_count() -> None:
    turns: list[str] = []
    assert set(medians({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)) == {"a", "b"}
    assert turns == ["a", "b"] * 3
