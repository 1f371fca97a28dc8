"""What a GPU would be measured by runs on a CPU as well, with the same fields."""

import torch

from benchmarks.cuda import BILLION, MILLIONS, Size, measure
from lightning_dalle.models.transformer import TransformerConfig


def test_all_three_are_measured_where_there_is_no_gpu() -> None:
    small = TransformerConfig(n_layer=3, n_head=2, n_embd=16)
    size = Size(text_len=4, text_vocab_size=9, grid=2, codebook_size=5, train_batch=2, candidates=3, rounds=1, side=64)
    measured = measure(size, small, small, "cpu")
    assert {name: list(of) for name, of in measured.items()} == {
        "train": ["parameters", "step_seconds", "share_of_bf16_rate", "bf16_rate"],
        "decode": ["codes_per_second", "share_of_bandwidth", "bandwidth"],
        "candidates": ["parameters", "seconds"],
    }
    assert all(value > 0 for of in measured.values() for value in of.values())


def test_the_models_are_as_large_as_it_says() -> None:
    for config, count in ((BILLION, 1.0e9), (MILLIONS, 0.33e9)):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Size().model(config, "meta").parameters())
        assert abs(parameters / count - 1) < 0.05
