"""Time of each attention kernel relative to causal SDPA, on grids from 8x8 to 64x64, forward and backward.

    python -m benchmarks.attention

The kernels take turns in one process. Each pattern is timed with its structured kernel (local on a CPU, FlexAttention
on CUDA), even where `attend` prefers the dense one; `chosen` records the choice. Data types are fp32, and bf16 where it
is native. On one thread the benchmark counts CPU time, which other processes disturb less; otherwise wall-clock time.
It prints medians and ratios, appends them to benchmarks/results/attention.jsonl and plots them in attention.png.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor

from benchmarks.recording import RESULTS, record, run
from lightning_dalle.hardware import has_native_bf16
from lightning_dalle.models.attention.dense import dense
from lightning_dalle.models.attention.dispatch import use_flex, use_local
from lightning_dalle.models.attention.local import local
from lightning_dalle.models.attention.patterns import Pattern

SIZES = {8: (17, 16), 16: (65, 4), 32: (257, 2), 64: (257, 1)}
"""Number of text positions, start vector included, and batch size, by grid."""
HEADS, HEAD_DIM, KERNEL, ROUNDS = 4, 64, 11, 5
KINDS = ["row", "column", "conv"]

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def structured_kernel(pattern: Pattern, device: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], bool]:
    """Return the kernel that uses a pattern's structure, and whether `attend` chooses it."""
    if device == "cuda":
        from lightning_dalle.models.attention.flex import flex

        return flex, use_flex(pattern, HEAD_DIM)
    return local, use_local(pattern, dtype)


def seconds(kernel: Kernel, qkv: Tensor) -> tuple[float, float]:
    """Return the time of the forward pass, and of forward and backward together."""
    now = time.process_time if qkv.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    finish = torch.cuda.synchronize if qkv.device.type == "cuda" else lambda: None
    qkv = qkv.clone().requires_grad_()
    finish()
    start = now()
    y = kernel(*qkv.permute(2, 0, 3, 1, 4))  # (b, h, s, d) each, with the model's memory layout
    finish()
    forward = now() - start
    y.backward(torch.ones_like(y))
    finish()
    return forward, now() - start


def measure(grid: int, text_len: int, batch: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Return each kernel's median times in milliseconds, and their ratios, after one round of warm-up."""
    image_len = grid**2 - 1  # the model does not read the last code
    patterns = [Pattern(kind=kind, text_len=text_len, image_len=image_len, grid=grid, kernel=KERNEL) for kind in KINDS]
    chosen = {"causal": False, "dense": False}
    kernels: dict[str, Kernel] = {
        "causal": partial(F.scaled_dot_product_attention, is_causal=True),
        "dense": partial(dense, pattern=patterns[0]),  # takes the same time for each pattern
    }
    for pattern in patterns:
        kernel, chosen[pattern.kind] = structured_kernel(pattern, device, dtype)
        kernels[pattern.kind] = partial(kernel, pattern=pattern)
    qkv = torch.randn(batch, text_len + image_len, 3, HEADS, HEAD_DIM).to(device, dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kernels}
    for _ in range(rounds + 1):
        for name, kernel in kernels.items():
            times[name].append(seconds(kernel, qkv))
    medians = {name: [statistics.median(part) for part in zip(*each[1:], strict=True)] for name, each in times.items()}
    return {
        name: {
            "forward_ms": round(1000 * forward, 2),
            "both_ms": round(1000 * both, 2),
            "forward_of_causal": round(forward / medians["causal"][0], 3),
            "both_of_causal": round(both / medians["causal"][1], 3),
            "both_of_dense": round(both / medians["dense"][1], 3),
            "chosen": chosen[name],
        }
        for name, (forward, both) in medians.items()
    }


def chart(measured: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Plot forward and backward time relative to causal SDPA over the grid, in one panel per data type."""
    figure = Figure(figsize=(4.4 * len(measured), 3.6), layout="constrained")
    for axis, (dtype, by_grid) in zip(
        figure.subplots(1, len(measured), squeeze=False, sharey=True)[0], measured.items(), strict=True
    ):
        grids = [int(grid) for grid in by_grid]
        axis.axhline(1, color="grey", linewidth=1, label="causal SDPA")
        for name, style in {"dense": "--", "row": "-", "column": "-", "conv": "-"}.items():
            axis.plot(
                grids, [kernels[name]["both_of_causal"] for kernels in by_grid.values()], style, marker="o", label=name
            )
        axis.set(xlabel="grid", title=f"forward and backward, {dtype}", xscale="log", yscale="log")
        axis.set_xticks(grids, [f"{grid}x{grid}" for grid in grids], minor=False)
        axis.set_yticks([1 / 8, 1 / 4, 1 / 2, 1, 2])
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.supylabel("time relative to causal SDPA")
    return figure


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_native_bf16(device) else {})
    measured = {
        name: {
            str(grid): measure(grid, text_len, batch, dtype, device, ROUNDS)
            for grid, (text_len, batch) in SIZES.items()
        }
        for name, dtype in dtypes.items()
    }
    result = {
        "measured": measured,
        "sizes": {grid: {"text": text_len, "batch": batch} for grid, (text_len, batch) in SIZES.items()},
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "rounds": ROUNDS,
    }
    record("attention", result)
    chart(measured).savefig(RESULTS / "attention.png", dpi=150)


if __name__ == "__main__":
    run(main)
