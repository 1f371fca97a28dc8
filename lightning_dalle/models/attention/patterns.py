"""Attention patterns: which earlier positions each position of a sequence sees (paper, Fig. 11).

To add a pattern, write its function here and enter it in `Kind` and `PATTERNS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor], Tensor]
"""Function of query and key positions q and k, integers that broadcast, that returns whether q sees k."""

Kind = Literal["full", "row", "column", "conv"]


class ImagePattern(NamedTuple):
    """Attention between image positions: the earlier codes that each one sees."""

    mask: MaskMod
    """Whether image position q sees image position k, defined for q >= k in raster order."""
    lookback: int | None = None
    """Largest distance q - k at which q sees k; None for no limit."""
    column_major: bool = False
    """Whether each position sees only its own column; kernels then process the image column by column."""


def full(grid: int, kernel: int) -> ImagePattern:
    """Return the pattern in which each position sees all earlier codes."""
    return ImagePattern(lambda q, k: torch.ones_like(q - k, dtype=torch.bool))


def row(grid: int, kernel: int) -> ImagePattern:
    """Return the pattern in which each position sees the last `grid` codes, back to the one directly above."""
    return ImagePattern(lambda q, k: q - k <= grid, lookback=grid)


def column(grid: int, kernel: int) -> ImagePattern:
    """Return the pattern in which each position sees all codes above it in its column."""
    return ImagePattern(lambda q, k: (q - k) % grid == 0, column_major=True)


def convolutional(grid: int, kernel: int) -> ImagePattern:
    """Return the pattern in which each position sees the upper half of a square of side `kernel` around it.

    Left and right of the image, the square continues in the row above or below, as raster order does.
    """
    radius = kernel // 2
    lookback = (grid + 1) * radius
    return ImagePattern(lambda q, k: (q - k <= lookback) & ((q - k + radius) % grid <= 2 * radius), lookback)


PATTERNS: dict[Kind, Callable[[int, int], ImagePattern]] = {
    "full": full, "row": row, "column": column, "conv": convolutional,
}  # fmt: skip


def layer_kinds(n_layer: int) -> list[Kind]:
    """Return each layer's pattern: row, column, row, row, repeated; the last is convolutional (paper, appendix B.1)."""
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layer)]
    return [*kinds, "conv"]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Attention pattern of a sequence: `text_len` text positions, then `image_len` codes in raster order.

    Attention is causal. Every image position sees all text and the earlier codes of its kind (paper, footnote 7).
    """

    kind: Kind
    """Name of the pattern between image positions."""
    text_len: int
    """Number of positions before the image, the start vector included."""
    image_len: int
    """Number of image positions; at most those of the grid."""
    grid: int
    """Number of codes in a row of the image."""
    kernel: int
    """Side of the convolutional pattern's square; odd."""

    @property
    def length(self) -> int:
        """Number of positions of the sequence."""
        return self.text_len + self.image_len

    @property
    def image(self) -> ImagePattern:
        """Attention between image positions, as `kind` names it."""
        return PATTERNS[self.kind](self.grid, self.kernel)

    @property
    def is_causal(self) -> bool:
        """Whether every position sees all earlier positions, as in plain causal attention."""
        return self.kind == "full" or self.image_len == 0

    @property
    def lookback(self) -> int:
        """Largest distance from an image position to one that it sees."""
        return self.image_len if self.image.lookback is None else self.image.lookback

    def prefix(self, length: int) -> "Pattern":
        """Return the pattern of the sequence's first `length` positions."""
        text_len = min(length, self.text_len)
        return replace(self, text_len=text_len, image_len=length - text_len)

    @property
    def mask_mod(self) -> MaskMod:
        """Function that returns whether query position q sees key position k, in text or image."""
        image_mask, text_len = self.image.mask, self.text_len
        return lambda q, k: (q >= k) & ((k < text_len) | image_mask(q - text_len, k - text_len))

    def mask(self) -> Bool[Tensor, "s s"]:
        """Return the dense mask: True where a query (row) sees a key (column)."""
        position = torch.arange(self.length)
        return self.mask_mod(position[:, None], position)


def render(mask: Bool[Tensor, "q k"]) -> str:
    """Return a mask as text: one line per query, `#` where it sees a key."""
    return "\n".join("".join("#" if visible else "." for visible in line) for line in mask.tolist())
