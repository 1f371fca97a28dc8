"""How many times as fast as dalle-pytorch's our sampling is, at that library's size.

    python -m benchmarks.sampling

Rounds of both take turns in one process, on the same threads, in batches of 8; ours alone in larger ones after that.
Ours is the pipeline's own: from captions to codes, the reading of the captions included, in the number format that it
chooses. The peer's is its repaired best, `benchmarks.peer.cached_images`; it decodes its codes as well, by a dVAE that
is small beside its transformer. Where ours spends its time stands beside what a step would take if it were no more than
its products, and no more than its weights read once, at the rates of this machine. Prints the medians and their ratio,
and appends them to benchmarks/results/sampling.jsonl.
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

from benchmarks.recording import record
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.inference.sampling import in_native_bf16, sample
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig

BATCH, LARGER, ROUNDS = 8, (64, 512), 5

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of both models. Ours has 7.1 million parameters, the peer's 9.2: its MLPs are gated."""

    n_embd: int = 256
    n_layer: int = 8
    n_head: int = 8
    text_len: int = 32
    text_vocab_size: int = 1024
    grid: int = 8
    codebook_size: int = 512

    def captions(self, batch: int) -> Tensor:
        """Without padding, which is 0 in the peer: (batch, text_len)."""
        return torch.randint(1, self.text_vocab_size, (batch, self.text_len))


def our_model(size: Size) -> DALLE:
    """Ours, as the pipeline samples from it."""
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd),
        text_len=size.text_len,
        text_vocab_size=size.text_vocab_size,
        grid=size.grid,
        codebook_size=size.codebook_size,
    )
    return in_native_bf16(DALLE(config).eval())


def our_run(model: DALLE, text_tokens: Tensor) -> Run:
    """A picture's codes for each caption."""
    return lambda: sample(model, text_tokens, list(range(len(text_tokens))), SamplingOptions())


def peers_run(size: Size, batch: int) -> Run:
    """dalle-pytorch's, with all its kinds of attention, which are masked full attention when it samples."""
    from benchmarks import peer  # installs it

    n_layer = 3  # of its dVAE
    vae = peer.DiscreteVAE(image_size=size.grid * 2**n_layer, num_tokens=size.codebook_size, num_layers=n_layer)
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
    text_tokens = size.captions(batch)
    return lambda: peer.cached_images(dalle, text_tokens)


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Seconds of each, all of them once a round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def floor(model: DALLE, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step's products at the rate of a large one, and of reading its weights at a copy's rate."""
    weights = [p for p in [*model.transformer.parameters(), *model.image_head.parameters()] if p.ndim == 2]
    count, itemsize = sum(weight.numel() for weight in weights), weights[0].itemsize
    side, many = 1024, 2**24
    square, long = torch.randn(side, side).to(weights[0].dtype), torch.zeros(many)
    taken = medians({"product": lambda: F.linear(square, square), "copy": long.clone}, rounds)
    return {
        "products_ms": round(1000 * 2 * count * batch * taken["product"] / (2 * side**3), 3),
        "weights_ms": round(1000 * count * itemsize * taken["copy"] / (2 * many * long.itemsize), 3),
    }


def shares(run: Run) -> dict[str, float]:
    """Of the ten operators that take most of a run."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    most = sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in most}


@torch.no_grad()
def ours(size: Size, batches: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Of each batch: codes a second, a step's time and floor, and where the time goes."""
    model = our_model(size)
    measured = {}
    for batch in batches:
        run = our_run(model, size.captions(1).expand(batch, -1))
        taken = medians({"ours": run}, rounds)["ours"]
        measured[str(batch)] = {
            "codes_per_second": round(batch * size.grid**2 / taken),
            "step_ms": round(1000 * taken / size.grid**2, 3),
            "floor": floor(model, batch, rounds),
            "shares": shares(run),
        }
    return measured


def main() -> None:
    torch.manual_seed(0)
    size = Size()
    runs = {"ours": our_run(our_model(size), size.captions(BATCH)), "dalle-pytorch": peers_run(size, BATCH)}
    seconds = medians(runs, ROUNDS)
    result = {
        "codes_per_second": {name: round(BATCH * size.grid**2 / taken) for name, taken in seconds.items()},
        "times_as_fast": round(seconds["dalle-pytorch"] / seconds["ours"], 1),
        "candidates_of_one_caption": ours(size, (BATCH, *LARGER), 2),
        "batch": BATCH,
        "size": asdict(size),
        "rounds": ROUNDS,
    }
    record("sampling", result)


if __name__ == "__main__":
    main()
