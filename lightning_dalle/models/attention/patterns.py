"""Attention patterns: which earlier positions of a stream each position may see (paper, Fig. 11).

Knows positions in a stream of text, then of an image in raster order. Knows nothing of attention, weights or layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool
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


def layer_kinds(n_layer: int) -> list[Kind]:
    """The paper's order: row, column, row, row and again; the last layer convolutional (section 2.2, appendix B.1)."""
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layer)]
    return [*kinds, "conv"]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What the positions of a stream may see: `text_len` of text, then `image_len` of an image in raster order.

    Causal; every image token sees all text, and those earlier image tokens that are near (paper, footnote 7).
    """

    kind: Kind
    """Which image tokens are near."""
    text_len: int
    """Positions before the image, the start vector included."""
    image_len: int
    """Positions of the image: the grid's, or fewer where the last of them are not read."""
    grid: int
    """Image tokens in a row."""
    kernel: int
    """Side of the square that `conv` sees the upper half of; odd."""

    @property
    def near(self) -> Near:
        """The predicate of the kind."""
        grid = self.grid
        kinds = {"full": full, "row": row(grid), "column": column(grid), "conv": convolutional(grid, self.kernel)}
        return kinds[self.kind]

    @property
    def is_causal(self) -> bool:
        """Is all seen that precedes?"""
        return self.kind == "full" or self.image_len == 0

    @property
    def reach(self) -> int:
        """How many positions back the farthest image token is that an image token may see, edges aside."""
        reaches = {"row": self.grid, "conv": (self.grid + 1) * (self.kernel // 2)}
        return reaches.get(self.kind, self.image_len)

    def beginning(self, length: int) -> "Pattern":
        """That of a stream's first `length` positions."""
        text_len = min(length, self.text_len)
        return replace(self, text_len=text_len, image_len=length - text_len)

    @property
    def sees(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Of any positions q and k of the stream, integers of shapes that broadcast: may q see k?"""
        near, text_len = self.near, self.text_len
        return lambda q, k: (q >= k) & ((k < text_len) | near(q - text_len, k - text_len))

    def mask(self) -> Bool[Tensor, "s s"]:
        """The whole stream's, True where a query (row) may see a key (column)."""
        position = torch.arange(self.text_len + self.image_len)
        return self.sees(position[:, None], position)


def picture(mask: Bool[Tensor, "q k"]) -> str:
    """The mask as text, `#` where a query sees a key: one line a query."""
    return "\n".join("".join("#" if seen else "." for seen in line) for line in mask.tolist())
