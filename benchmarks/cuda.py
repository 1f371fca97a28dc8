"""GPU utilisation of training and sampling, relative to the bf16 matmul rate and the memory bandwidth.

    python -m benchmarks.cuda

- train: forward and backward of a model of 1 billion parameters at 1,280 positions, as a fraction of the bf16 matmul
  rate. Only products with weights are counted; attention and the softmax over the logits are not.
- decode: one image, code by code, as a fraction of the bandwidth that reading all weights once per code needs.
- candidates: seconds for 512 images of 1,024 codes with a model of 300 million parameters.

Both reference rates are measured in the same run, by a product and a copy of large matrices. The benchmark prints the
figures and appends them to benchmarks/results/cuda.jsonl.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from benchmarks.recording import record, run
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.sampling import sample_codes, to_native_bf16
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig

BILLION = TransformerConfig(n_layer=24, n_head=28, n_embd=1792)
"""Shape with 0.9 billion parameters in the blocks, 1.0 with embeddings and heads."""
MILLIONS = TransformerConfig(n_layer=22, n_head=16, n_embd=1024)
"""Shape with 277 million parameters in the blocks, 328 with embeddings and heads."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the sequences and of the measurements; the defaults are the paper's sequences."""

    text_len: int = 256
    text_vocab_size: int = 16384
    grid: int = 32
    codebook_size: int = 8192
    train_batch: int = 16
    candidates: int = 512
    rounds: int = 5
    side: int = 8192
    """Side of the square matrices that are multiplied for the matmul rate and copied for the bandwidth."""

    def model(self, transformer: TransformerConfig, device: str) -> DALLE:
        """Return an untrained model."""
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
    """Return the mean seconds of a run, after one run that warms up."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    finish()
    begun = time.perf_counter()
    for _ in range(rounds):
        run()
    finish()
    return (time.perf_counter() - begun) / rounds


def multiplied(model: DALLE) -> list[Parameter]:
    """Return the matrices that every image position is multiplied with."""
    return [p for p in [*model.transformer.parameters(), *model.image_head.parameters()] if p.ndim == 2]


def train(size: Size, transformer: TransformerConfig, device: str) -> dict[str, float]:
    """Measure forward and backward in bf16 autocast: 6 FLOPs per weight and position, 4 of them in the backward."""
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
    per_sequence = blocks * (size.text_len + size.grid**2)
    per_sequence += model.text_head.weight.numel() * size.text_len + model.image_head.weight.numel() * size.grid**2
    square = torch.randn(size.side, size.side, device=device).bfloat16()
    rate = 2 * size.side**3 / seconds(lambda: F.linear(square, square), device, size.rounds)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": taken,
        "share_of_bf16_rate": 6 * per_sequence * size.train_batch / taken / rate,
        "bf16_rate": rate,
    }


def decode(size: Size, transformer: TransformerConfig, device: str) -> dict[str, float]:
    """Measure sampling one image in bf16."""
    model = to_native_bf16(size.model(transformer, device).eval())
    text_tokens = model.null_caption(1)
    taken = seconds(lambda: sample_codes(model, text_tokens, [0], SamplingConfig()), device, size.rounds) / size.grid**2
    square = torch.zeros(size.side, size.side, device=device)
    bandwidth = 2 * square.nbytes / seconds(square.clone, device, size.rounds)
    return {
        "codes_per_second": 1 / taken,
        "share_of_bandwidth": sum(weight.nbytes for weight in multiplied(model)) / taken / bandwidth,
        "bandwidth": bandwidth,
    }


def candidates(size: Size, transformer: TransformerConfig, device: str) -> dict[str, float]:
    """Measure sampling all candidates of one caption in one batch."""
    model = to_native_bf16(size.model(transformer, device).eval())
    text_tokens = model.null_caption(size.candidates)
    seeds = list(range(size.candidates))
    taken = seconds(lambda: sample_codes(model, text_tokens, seeds, SamplingConfig()), device, 1)
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds": taken}


def measure(
    size: Size, trained: TransformerConfig, sampled: TransformerConfig, device: str
) -> dict[str, dict[str, float]]:
    """Measure training, decoding and candidates, one after the other."""
    return {
        "train": train(size, trained, device),
        "decode": decode(size, trained, device),
        "candidates": candidates(size, sampled, device),
    }


def main() -> None:
    """Measure one GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a GPU, but torch finds no CUDA device")
    torch.manual_seed(0)
    record("cuda", measure(Size(), BILLION, MILLIONS, "cuda"))


if __name__ == "__main__":
    run(main)
