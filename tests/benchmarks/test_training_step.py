"""Our side of the benchmark trains, and all sides take turns."""

from functools import partial

import pytest
from torch.optim import AdamW

from benchmarks.training_step import Size, medians, our_step
from lightning_dalle.training.optim.muon import MuonAdamW

TINY = Size(batch=2, n_embd=16, n_layer=2, n_head=2, text_len=3, text_vocab_size=8, grid=4, codebook_size=8)


@pytest.mark.parametrize("optimizer_factory", [partial(AdamW, lr=1e-2, fused=True), MuonAdamW])
def test_our_step_trains(optimizer_factory: partial[AdamW] | type[MuonAdamW]) -> None:
    step = our_step(TINY, optimizer_factory)
    losses = [step() for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]


def test_steps_take_turns() -> None:
    taken: list[str] = []
    seconds = medians({name: lambda name=name: float(taken.append(name) or 0) for name in ("ours", "its")}, rounds=2)
    assert taken == ["ours", "its"] * 3
    assert set(seconds) == {"ours", "its"}
