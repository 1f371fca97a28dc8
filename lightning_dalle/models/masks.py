"""Attention masks as predicates: which earlier image token is near enough to be seen (paper, Fig. 11).

Knows positions in a raster. Knows nothing of attention, weights or devices.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Near = Callable[[Tensor, Tensor], Tensor]
"""Of image positions q >= k in raster order: may q see k?"""

Kind = Literal["full", "row", "column", "conv"]


def full(q: Tensor, k: Tensor) -> Tensor:
    """All earlier image tokens."""
    return torch.ones_like(q - k, dtype=torch.bool)


def row(grid: int) -> Near:
    """The last `grid` image tokens: back to the one right above, in the previous row."""
    return lambda q, k: q - k <= grid


def column(grid: int) -> Near:
    """The image tokens right above."""
    return lambda q, k: (q - k) % grid == 0


def convolutional(grid: int, kernel: int) -> Near:
    """The upper half of a square of side `kernel`, which wraps around the edges in raster order as `row` does."""
    radius = kernel // 2
    return lambda q, k: (q - k <= (grid + 1) * radius) & ((q - k + radius) % grid <= 2 * radius)


def near(kind: Kind, grid: int, kernel: int) -> Near:
    """The predicate of a layer's kind."""
    return {"full": full, "row": row(grid), "column": column(grid), "conv": convolutional(grid, kernel)}[kind]


def layer_kinds(n_layer: int) -> list[Kind]:
    """The paper's order: row, column, row, row and again; the last layer convolutional (section 2.2, appendix B.1)."""
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layer)]
    return [*kinds, "conv"]


def dense(near: Near, text_len: int, image_len: int) -> Bool[Tensor, "s s"]:
    """The mask of a stream of text then image, True where a query (row) may see a key (column).

    Causal; every image token sees all text tokens, and those image tokens that are near (paper, footnote 7).
    """
    position: Int[Tensor, " s"] = torch.arange(text_len + image_len)
    q, k = position[:, None], position[None, :]
    return (q >= k) & ((k < text_len) | near(q - text_len, k - text_len))


def picture(mask: Bool[Tensor, "q k"]) -> str:
    """The mask as text, `#` where a query sees a key: one line a query."""
    return "\n".join("".join("#" if seen else "." for seen in line) for line in mask.tolist())
