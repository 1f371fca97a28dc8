"""Speed of sampling codes, compared with dalle-pytorch at that library's default size.

    python -m benchmarks.sampling

Both libraries sample batches of 8 in turns, in one process with the same threads; ours then samples larger batches.
Our time is that of the pipeline from tokens to codes: prefill, decode steps, bf16 where it is native. The peer runs
`benchmarks.peer.cached_images`, its fastest repaired path; its time includes the decoding by a small dVAE. For our
model the benchmark also records the operators that take most time, and lower bounds of a decode step: its matrix
products at this machine's rate for large ones, and one read of its weights at the rate of a copy. Prints the medians
and their ratio, and appends them to benchmarks/results/sampling.jsonl.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.recording import record, run
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.sampling import sample_codes, to_native_bf16
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig

BATCH, LARGER, ROUNDS = 8, (64, 512), 5

Sampler = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of both models: ours has 7.1 million parameters, the peer's 9.2 million, since its MLPs are gated."""

    n_embd: int = 256
    n_layer: int = 8
    n_head: int = 8
    text_len: int = 32
    text_vocab_size: int = 1024
    grid: int = 8
    codebook_size: int = 512

    def text_tokens(self, batch: int) -> Tensor:
        """Return random tokens (batch, text_len) without 0, which is padding in the peer."""
        return torch.randint(1, self.text_vocab_size, (batch, self.text_len))


def our_model(size: Size) -> DALLE:
    """Return our model, with weights in the number format that the pipeline samples with."""
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd),
        text_len=size.text_len,
        text_vocab_size=size.text_vocab_size,
        grid=size.grid,
        codebook_size=size.codebook_size,
    )
    return to_native_bf16(DALLE(config).eval())


def our_sampler(model: DALLE, text_tokens: Tensor) -> Sampler:
    """Return a function that samples the codes of one image per row of text tokens."""
    return lambda: sample_codes(model, text_tokens, list(range(len(text_tokens))), SamplingConfig())


def peers_sampler(size: Size, batch: int) -> Sampler:
    """Return a function that samples images from dalle-pytorch with all its attention types.

    They are masked full attention when it samples.
    """
    from benchmarks import peer  # installs dalle-pytorch

    num_layers = 3
    vae = peer.DiscreteVAE(image_size=size.grid * 2**num_layers, num_tokens=size.codebook_size, num_layers=num_layers)
    dalle = peer.DALLE(
        dim=size.n_embd,
        vae=vae,
        num_text_tokens=size.text_vocab_size,
        text_seq_len=size.text_len,
        depth=size.n_layer,
        heads=size.n_head,
        dim_head=size.n_embd // size.n_head,
        attn_types=("full", "axial_row", "axial_col", "conv_like"),
        optimize_for_inference=True,
    ).eval()
    text_tokens = size.text_tokens(batch)
    return lambda: peer.cached_images(dalle, text_tokens)


def median_seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each function; all run once per round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def lower_bounds(model: DALLE, batch: int, rounds: int) -> dict[str, float]:
    """Return lower bounds of a decode step in ms: matrix products at the rate of a large one, weights read once."""
    weights = [p for p in [*model.transformer.parameters(), *model.image_head.parameters()] if p.ndim == 2]
    count, itemsize = sum(weight.numel() for weight in weights), weights[0].itemsize
    side, length = 1024, 2**24
    square, vector = torch.randn(side, side).to(weights[0].dtype), torch.zeros(length)
    seconds = median_seconds({"product": lambda: F.linear(square, square), "copy": vector.clone}, rounds)
    return {
        "products_ms": round(1000 * 2 * count * batch * seconds["product"] / (2 * side**3), 3),
        "weights_ms": round(1000 * count * itemsize * seconds["copy"] / (2 * length * vector.itemsize), 3),
    }


def slowest_operators(sampler: Sampler) -> dict[str, float]:
    """Return the fraction of the time of each of the ten slowest operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        sampler()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    slowest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in slowest}


@torch.no_grad()
def measure_ours(size: Size, batches: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Measure each batch size: codes per second, time and lower bounds of a step, and the slowest operators."""
    model = our_model(size)
    measured = {}
    for batch in batches:
        sampler = our_sampler(model, size.text_tokens(1).expand(batch, -1))
        seconds = median_seconds({"ours": sampler}, rounds)["ours"]
        measured[str(batch)] = {
            "codes_per_second": round(batch * size.grid**2 / seconds),
            "step_ms": round(1000 * seconds / size.grid**2, 3),
            "lower_bounds": lower_bounds(model, batch, rounds),
            "slowest_operators": slowest_operators(sampler),
        }
    return measured


def main() -> None:
    torch.manual_seed(0)
    size = Size()
    samplers = {
        "ours": our_sampler(our_model(size), size.text_tokens(BATCH)),
        "dalle-pytorch": peers_sampler(size, BATCH),
    }
    seconds = median_seconds(samplers, ROUNDS)
    result = {
        "codes_per_second": {name: round(BATCH * size.grid**2 / duration) for name, duration in seconds.items()},
        "times_as_fast": round(seconds["dalle-pytorch"] / seconds["ours"], 1),
        "candidates_of_one_prompt": measure_ours(size, (BATCH, *LARGER), 2),
        "batch": BATCH,
        "size": asdict(size),
        "rounds": ROUNDS,
    }
    record("sampling", result)


if __name__ == "__main__":
    run(main)
