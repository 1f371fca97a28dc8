"""Trains the peer as its own scripts do, for a number of steps: its dVAE, then its transformer on that one's codes.

Knows the peer's models, tensors of OpenMoji and steps. Knows nothing of clocks or of what is measured.

The settings are those of its `train_vae.py` and `train_dalle.py` (Adam; no KL loss; relaxed codes rather than
straight-through ones; an image loss of 7 times the text's; gradients clipped to 0.5), with these changes, each in its
favour on a small data set and few minutes: narrower models, which take more steps in the same time (pilots, LOG.md);
the temperature and the dVAE's learning rate reach their ends within the run rather than after 12,000 steps of a run of
any length; the learning rate of the transformer is annealed, which its script leaves constant; pictures lie in memory,
codes are computed once, and the transformer runs in bf16 autocast where that is faster. The dVAE runs in fp32, as its
script has it: bf16 gains it little, if anything (a step took 0.83 to 1.05 of the time on a Xeon with AMX).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.peer import DALLE, DiscreteVAE
from lightning_dalle.hardware import has_native_bf16

VAE = {
    "image_size": 32,
    "num_tokens": 512,
    "codebook_dim": 256,
    "num_layers": 2,
    "hidden_dim": 64,
    "num_resnet_blocks": 2,
}
VAE_BATCH, VAE_RATES = 8, (1e-3, 1.3e-4)
TEMPERATURES = (1.0, 0.5)
TRANSFORMER = {
    "dim": 256,
    "depth": 4,
    "heads": 8,
    "dim_head": 32,
    "attn_types": ("full", "axial_row", "axial_col", "conv_like"),
    "loss_img_weight": 7,
}
TRANSFORMER_BATCH, TRANSFORMER_RATES, CLIP = 16, (1e-3, 1e-5), 0.5

Step = Callable[[float], None]
"""One step of a training, told how far the run has come, in [0, 1)."""


def vae_training(images: Float[Tensor, "n 3 h w"], seed: int = 0) -> tuple[Any, Step]:
    """A new dVAE and its step.

    Args:
        images: in [0, 1], of the training split.
        seed: of the weights and, with torch's own generator, of the batches and the noise.
    """
    torch.manual_seed(seed)
    vae = new_vae()
    optimizer = torch.optim.Adam(vae.parameters(), lr=VAE_RATES[0])
    batches = _batches(len(images), VAE_BATCH)

    def step(progress: float) -> None:
        _set_rate(optimizer, VAE_RATES[0] * (VAE_RATES[1] / VAE_RATES[0]) ** progress)
        temperature = max(TEMPERATURES[0] * math.exp(-progress), TEMPERATURES[1])
        loss = vae(images[next(batches)], return_loss=True, temp=temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return vae, step


def transformer_training(
    vae: Any, text: Int[Tensor, "n t"], images: Float[Tensor, "n 3 h w"], vocab_size: int, seed: int = 0
) -> tuple[Any, Step]:
    """A new transformer on a trained dVAE, and its step.

    Args:
        vae: in eval mode from now on.
        text: token ids, 0 for padding, as the peer takes them.
        images: in [0, 1], beside the text.
        vocab_size: ids of the text are below.
        seed: as of the dVAE.
    """
    torch.manual_seed(seed)
    codes = torch.cat([vae.get_codebook_indices(part) for part in images.split(64)])
    dalle = new_transformer(vae, text.shape[1], vocab_size)
    weights = [weight for weight in dalle.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=TRANSFORMER_RATES[0])
    batches = _batches(len(text), TRANSFORMER_BATCH)
    is_bf16 = has_native_bf16("cpu")

    def step(progress: float) -> None:
        first, last = TRANSFORMER_RATES
        _set_rate(optimizer, last + (first - last) * (1 + math.cos(math.pi * progress)) / 2)
        rows = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = dalle(text[rows], codes[rows], return_loss=True)
        loss.backward()
        clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return dalle, step


def new_vae() -> Any:
    """Untrained."""
    return DiscreteVAE(**VAE)


def new_transformer(vae: Any, text_len: int, vocab_size: int, **form: bool) -> Any:
    """Untrained; `optimize_for_inference=True` is the form that the cache serves, of the same weights."""
    return DALLE(vae=vae, num_text_tokens=vocab_size, text_seq_len=text_len, **TRANSFORMER, **form)


def as_peers_text(text_tokens: Int[Tensor, "n t"], vocab_size: int) -> Int[Tensor, "n t"]:
    """Our tokenizer's ids as the peer takes them: 0 is its padding, at whatever position, and tokens begin at 1."""
    return torch.where(text_tokens < vocab_size, text_tokens + 1, 0)


def train(step: Step, steps: int, on_step: Callable[[int], None] = lambda done: None) -> None:
    """Takes as many steps; `on_step` is told how many are done."""
    for done in range(steps):
        step(done / steps)
        on_step(done + 1)


def steps_per_second(step: Step, steps: int) -> float:
    """By the median of as many steps, the first two left out."""
    taken = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        step(0.0)
        taken.append(time.perf_counter() - begun)
    return 1 / statistics.median(taken[2:])


def _batches(count: int, size: int) -> Iterator[Int[Tensor, " b"]]:
    """Indices, shuffled anew in each epoch, whose last, smaller batch is left out."""
    while True:
        yield from torch.randperm(count)[: count // size * size].split(size)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
