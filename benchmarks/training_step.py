"""Speed of our transformer's training step relative to dalle-pytorch's, at the same size.

    python -m benchmarks.training_step

Both systems take turns in one process, on the same threads. Our step is that of `fit`: forward, loss, backward,
gradient clipping and optimizer step in bf16 where it is native. The peer's step uses the optimizer and clipping of its
train_dalle.py, in fp32 (its default) and in bf16. Both get codes, so no dVAE runs. The benchmark prints medians and
ratios, and appends them to benchmarks/results/training_step.jsonl.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.recording import record, run
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.training.optim.muon import MuonAdamW
from lightning_dalle.training.optim.param_groups import param_groups
from lightning_dalle.training.precision.native_bf16 import NativeBF16

ROUNDS = 5

Step = Callable[[], float]
"""Function that trains once on a fixed batch and returns the loss before the update."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of both models and their batch. Ours has 7.1 million parameters, the peer's 9.2: its MLPs are gated."""

    batch: int = 32
    n_embd: int = 256
    n_layer: int = 8
    n_head: int = 8
    text_len: int = 32
    text_vocab_size: int = 1024
    grid: int = 8
    codebook_size: int = 512

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Return random captions without padding (b, t), since the peer pads with 0, and random codes (b, i)."""
        text_tokens = torch.randint(1, self.text_vocab_size, (self.batch, self.text_len))
        return text_tokens, torch.randint(self.codebook_size, (self.batch, self.grid**2))


def our_step(size: Size, optimizer_factory: Callable[[list[dict[str, Any]]], Optimizer]) -> Step:
    """Return our training step, with the paper's row, column and convolutional attention."""
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd),
        text_len=size.text_len,
        text_vocab_size=size.text_vocab_size,
        grid=size.grid,
        codebook_size=size.codebook_size,
    )
    dalle = DALLE(config)
    optimizer = optimizer_factory(param_groups(dalle))
    precision = NativeBF16()
    precision.connect(dalle, [optimizer], [])
    text_tokens, codes = size.sequences()

    def step() -> float:
        optimizer.zero_grad()
        with precision.forward_context():
            logits = dalle(text_tokens, codes)
            loss = dalle_loss(logits.text, logits.image, text_tokens, codes, image_weight=7.0)["loss"]
        loss.backward()
        precision.clip_gradients(optimizer, 1.0)
        optimizer.step()
        return loss.item()

    return step


PEERS_PATTERNS = {"its four kinds": ("full", "axial_row", "axial_col", "conv_like"), "full": ("full",)}
"""Attention types of the peer's layers, repeated in turn: those of its README, and the default of train_dalle.py."""


def peers_step(size: Size, pattern: str, in_bf16: bool) -> Step:
    """Return dalle-pytorch's training step with one of its attention patterns."""
    from benchmarks import peer  # installs it

    n_layer = 3  # its dVAE only defines the grid size here
    vae = peer.DiscreteVAE(image_size=size.grid * 2**n_layer, num_tokens=size.codebook_size, num_layers=n_layer)
    dalle = peer.DALLE(
        dim=size.n_embd,
        vae=vae,
        num_text_tokens=size.text_vocab_size,
        text_seq_len=size.text_len,
        depth=size.n_layer,
        heads=size.n_head,
        dim_head=size.n_embd // size.n_head,
        attn_types=PEERS_PATTERNS[pattern],
    )
    parameters = [parameter for parameter in dalle.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-4)
    text_tokens, codes = size.sequences()

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
            loss = dalle(text_tokens, codes, return_loss=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        return loss.item()

    return step


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return the median seconds of each step. Every round runs each step once; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def main(rounds: int = ROUNDS) -> None:
    """Measure all training steps.

    Args:
        rounds: number of counted rounds.
    """
    torch.manual_seed(0)
    size = Size()
    ours = {
        "AdamW": our_step(size, partial(AdamW, lr=3e-4, fused=True)),
        "MuonAdamW": our_step(size, partial(MuonAdamW, lr=3e-4)),
    }
    peers = {
        f"{'bf16' if in_bf16 else 'fp32'}, {pattern}": peers_step(size, pattern, in_bf16)
        for in_bf16, pattern in itertools.product((False, True), PEERS_PATTERNS)
    }
    seconds = medians({**ours, **peers}, rounds)
    result = {
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "times_as_fast": {
            our: {f"as dalle-pytorch in {its}": round(seconds[its] / seconds[our], 2) for its in peers} for our in ours
        },
        "size": asdict(size),
        "rounds": rounds,
    }
    record("training_step", result)


if __name__ == "__main__":
    run(main)
