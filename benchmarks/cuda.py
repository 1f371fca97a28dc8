"""How much of a GPU training and sampling use: of its bf16 products, and of its memory's bandwidth.

    python -m benchmarks.cuda

- train: a model of a billion parameters at 1,280 positions, forward and backward; the share of the bf16 rate that its
  weights' products take. Attention is left out of the count, as is the softmax over ids that its logits go through.
- decode: a picture alone, code by code; the share of the bandwidth that it takes to read all weights once a code.
- candidates: 512 pictures of 1,024 codes by a model of 300 million.

Both rates are this GPU's, measured in the same run: a product of two large matrices, and a copy. Prints the figures,
and appends them to benchmarks/results/cuda.jsonl.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from benchmarks.recording import record
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.inference.sampling import in_native_bf16, sample
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig

BILLION = TransformerConfig(n_layer=24, n_head=28, n_embd=1792)
"""0.9 billion in its blocks, 1.0 with the embeddings and the heads."""
MILLIONS = TransformerConfig(n_layer=22, n_head=16, n_embd=1024)
"""277 million in its blocks, 328 with the embeddings and the heads."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the streams, and of what is measured of them; the defaults are the paper's streams."""

    text_len: int = 256
    text_vocab_size: int = 16384
    grid: int = 32
    codebook_size: int = 8192
    train_batch: int = 16
    candidates: int = 512
    rounds: int = 5
    side: int = 8192
    """Of the matrices whose product gives the rate, and whose copy gives the bandwidth."""

    def model(self, transformer: TransformerConfig, device: str) -> DALLE:
        """Untrained."""
        config = DALLEConfig(
            transformer=transformer,
            text_len=self.text_len,
            text_vocab_size=self.text_vocab_size,
            grid=self.grid,
            codebook_size=self.codebook_size,
        )
        with torch.device(device):
            return DALLE(config)


def seconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Of one of several runs; a first one warms up."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    finish()
    begun = time.perf_counter()
    for _ in range(rounds):
        run()
    finish()
    return (time.perf_counter() - begun) / rounds


def multiplied(model: DALLE) -> list[Parameter]:
    """The matrices that every image position is multiplied by."""
    return [p for p in [*model.transformer.parameters(), *model.image_head.parameters()] if p.ndim == 2]


def train(size: Size, transformer: TransformerConfig, device: str) -> dict[str, float]:
    """Forward and backward in bf16 autocast: six operations a weight and position, four of them on the way back."""
    model = size.model(transformer, device)
    text_tokens = torch.randint(size.text_vocab_size, (size.train_batch, size.text_len), device=device)
    codes = torch.randint(size.codebook_size, (size.train_batch, size.grid**2), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            logits = model(text_tokens, codes)
            loss = dalle_loss(logits.text, logits.image, text_tokens, codes, image_weight=7.0)["loss"]
        model.zero_grad()
        loss.backward()

    taken = seconds(step, device, size.rounds)
    blocks = sum(p.numel() for p in model.transformer.parameters() if p.ndim == 2)
    per_stream = blocks * (size.text_len + size.grid**2)
    per_stream += model.text_head.weight.numel() * size.text_len + model.image_head.weight.numel() * size.grid**2
    square = torch.randn(size.side, size.side, device=device).bfloat16()
    rate = 2 * size.side**3 / seconds(lambda: F.linear(square, square), device, size.rounds)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": taken,
        "share_of_bf16_rate": 6 * per_stream * size.train_batch / taken / rate,
        "bf16_rate": rate,
    }


def decode(size: Size, transformer: TransformerConfig, device: str) -> dict[str, float]:
    """A picture alone, in bf16."""
    model = in_native_bf16(size.model(transformer, device).eval())
    text_tokens = model.null_caption(1)
    taken = seconds(lambda: sample(model, text_tokens, [0], SamplingOptions()), device, size.rounds) / size.grid**2
    square = torch.zeros(size.side, size.side, device=device)
    bandwidth = 2 * square.nbytes / seconds(square.clone, device, size.rounds)
    return {
        "codes_per_second": 1 / taken,
        "share_of_bandwidth": sum(weight.nbytes for weight in multiplied(model)) / taken / bandwidth,
        "bandwidth": bandwidth,
    }


def candidates(size: Size, transformer: TransformerConfig, device: str) -> dict[str, float]:
    """Of one caption, in one batch."""
    model = in_native_bf16(size.model(transformer, device).eval())
    text_tokens = model.null_caption(size.candidates)
    seeds = list(range(size.candidates))
    taken = seconds(lambda: sample(model, text_tokens, seeds, SamplingOptions()), device, 1)
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds": taken}


def measure(
    size: Size, trained: TransformerConfig, sampled: TransformerConfig, device: str
) -> dict[str, dict[str, float]]:
    """The three, one after the other."""
    return {
        "train": train(size, trained, device),
        "decode": decode(size, trained, device),
        "candidates": candidates(size, sampled, device),
    }


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, Any] = {
        **measure(Size(), BILLION, MILLIONS, "cuda"),
    }
    record("cuda", result)


if __name__ == "__main__":
    main()
