"""What attention costs by its form: of the time of causal SDPA, over grids from 8 to 64, forward and backward.

    python -m benchmarks.attention

Rounds of all forms take turns in one process. Each pattern is measured in the form that knows its structure, also where
`attend` takes the masked one: `chosen` says which it is. In fp32, and in bf16 where it is native; masked attention is
SDPA but for short streams in bf16, where ours is by plain products. On one thread the CPU's time counts, which other
work on the machine disturbs less than the clock's; else the clock's. Prints the medians and their ratios, appends them
to benchmarks/results/attention.jsonl and draws them beside it.
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

from benchmarks.recording import RESULTS, record
from lightning_dalle.hardware import has_native_bf16
from lightning_dalle.models.attention.dispatch import is_for_blocks, is_for_windows, masked, windowed
from lightning_dalle.models.attention.patterns import Kind, Pattern

SIZES = {8: (17, 16), 16: (65, 4), 32: (257, 2), 64: (257, 1)}
"""By the grid: text positions, with the start vector, and streams in a batch."""
HEADS, HEAD_DIM, KERNEL, ROUNDS = 4, 64, 11, 5
KINDS: list[Kind] = ["row", "column", "conv"]

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def patterns(text_len: int, grid: int) -> dict[Kind, Pattern]:
    """As the model has them: all codes but the last are read."""
    return {
        kind: Pattern(kind=kind, text_len=text_len, image_len=grid**2 - 1, grid=grid, kernel=KERNEL) for kind in KINDS
    }


def structured(pattern: Pattern, device: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], bool]:
    """The form that knows a pattern's structure, and whether `attend` chooses it."""
    if device == "cuda":
        from lightning_dalle.models.attention.flex import block_sparse

        return block_sparse, is_for_blocks(pattern, HEAD_DIM)
    return windowed, is_for_windows(pattern, dtype)


def seconds(form: Form, qkv: Tensor) -> tuple[float, float]:
    """Of the forward, and of forward and backward."""
    now = time.process_time if qkv.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    finish = torch.cuda.synchronize if qkv.device.type == "cuda" else lambda: None
    qkv = qkv.clone().requires_grad_()
    finish()
    begun = now()
    y = form(*qkv.permute(2, 0, 3, 1, 4))  # (b, h, s, d) each, as the model makes them
    finish()
    forward = now() - begun
    y.backward(torch.ones_like(y))
    finish()
    return forward, now() - begun


def measure(grid: int, text_len: int, batch: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Medians of each form in milliseconds, and of causal SDPA's; a first round warms up."""
    chosen = {"causal": False, "masked": False}
    forms: dict[str, Form] = {"causal": partial(F.scaled_dot_product_attention, is_causal=True)}
    for kind, pattern in patterns(text_len, grid).items():
        form, chosen[kind] = structured(pattern, device, dtype)
        forms.setdefault("masked", partial(masked, pattern=pattern))  # as long whatever the mask shows
        forms[kind] = partial(form, pattern=pattern)
    qkv = torch.randn(batch, text_len + grid**2 - 1, 3, HEADS, HEAD_DIM).to(device, dtype)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            taken[name].append(seconds(form, qkv))
    medians = {
        name: [statistics.median(part) for part in zip(*times[1:], strict=True)] for name, times in taken.items()
    }
    return {
        name: {
            "forward_ms": round(1000 * forward, 2),
            "both_ms": round(1000 * both, 2),
            "forward_of_causal": round(forward / medians["causal"][0], 3),
            "both_of_causal": round(both / medians["causal"][1], 3),
            "both_of_masked": round(both / medians["masked"][1], 3),
            "chosen": chosen[name],
        }
        for name, (forward, both) in medians.items()
    }


def chart(measured: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Forward and backward of each form, of causal SDPA's time, over the grid; a panel for each number format."""
    figure = Figure(figsize=(4.4 * len(measured), 3.6), layout="constrained")
    for axis, (dtype, of_grids) in zip(
        figure.subplots(1, len(measured), squeeze=False, sharey=True)[0], measured.items(), strict=True
    ):
        grids = [int(grid) for grid in of_grids]
        axis.axhline(1, color="grey", linewidth=1, label="causal SDPA")
        for name, style in {"masked": "--", "row": "-", "column": "-", "conv": "-"}.items():
            axis.plot(
                grids, [forms[name]["both_of_causal"] for forms in of_grids.values()], style, marker="o", label=name
            )
        axis.set(xlabel="grid", title=f"forward and backward, {dtype}", xscale="log", yscale="log")
        axis.set_xticks(grids, [f"{grid}x{grid}" for grid in grids], minor=False)
        axis.set_yticks([1 / 8, 1 / 4, 1 / 2, 1, 2])
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.supylabel("of causal SDPA's time")
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
    main()
