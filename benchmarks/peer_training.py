"""Training of the peer as in its own scripts: first its dVAE, then its transformer on the dVAE's codes.

The settings are those of its `train_vae.py` and `train_dalle.py`: Adam, no KL loss, relaxed codes without the
straight-through estimator, an image loss of 7 times the text loss, gradients clipped at 0.5. These changes favour the
peer on a small data set with few minutes of training:

- narrower models, which take more steps in the same time (pilots in LOG.md);
- temperature and learning rate of the dVAE reach their final values within the run, not after 12,000 steps;
- the learning rate of the transformer is annealed; its script keeps it constant;
- images stay in memory, codes are computed once, and the transformer runs in bf16 autocast where that is faster.

The dVAE runs in fp32 as in its script. In bf16 its step took 0.83 to 1.05 of the time on a Xeon with AMX.
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

from benchmarks import peer
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
"""Function that performs one training step, given the progress of the run in [0, 1)."""


def vae_training(images: Float[Tensor, "n 3 h w"], seed: int = 0) -> tuple[Any, Step]:
    """Return a new dVAE and its training step.

    Args:
        images: training images in [0, 1].
        seed: seed of torch's global generator, which draws weights, batches and noise.
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
    """Return a new transformer for a trained dVAE, and its training step.

    Args:
        vae: trained dVAE; the peer switches it to eval mode.
        text: token ids of the peer, where 0 is padding.
        images: images in [0, 1] that belong to the captions.
        vocab_size: number of text ids.
        seed: seed of torch's global generator.
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
    """Return an untrained dVAE."""
    return peer.DiscreteVAE(**VAE)


def new_transformer(vae: Any, text_len: int, vocab_size: int, **form: bool) -> Any:
    """Return an untrained transformer; `optimize_for_inference=True` has the same weights and can use the cache."""
    return peer.DALLE(vae=vae, num_text_tokens=vocab_size, text_seq_len=text_len, **TRANSFORMER, **form)


def as_peers_text(text_tokens: Int[Tensor, "n t"], vocab_size: int) -> Int[Tensor, "n t"]:
    """Return our token ids as the peer's: 0 is padding at every position, and tokens start at 1."""
    return torch.where(text_tokens < vocab_size, text_tokens + 1, 0)


def train(step: Step, steps: int, on_step: Callable[[int], None] = lambda done: None) -> None:
    """Run a number of steps; `on_step` is called with the number of steps done."""
    for done in range(steps):
        step(done / steps)
        on_step(done + 1)


def steps_per_second(step: Step, steps: int) -> float:
    """Return the rate by the median time of a number of steps, after two that warm up."""
    taken = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        step(0.0)
        taken.append(time.perf_counter() - begun)
    return 1 / statistics.median(taken[2:])


def _batches(count: int, size: int) -> Iterator[Int[Tensor, " b"]]:
    """Yield batches of indices, reshuffled in each epoch; the last, smaller batch is dropped."""
    while True:
        yield from torch.randperm(count)[: count // size * size].split(size)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
