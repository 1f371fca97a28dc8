"""Attention patterns: which earlier positions each position of a sequence sees (paper, Fig. 11).

A pattern is one function with the decorator `attention_pattern`. Kernels and KV caches derive its extent from its mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool
from torch import Tensor

from lightning_dalle.errors import UserError

MaskMod = Callable[[Tensor, Tensor], Tensor]
"""Function of query and key positions q and k, integers that broadcast, that returns whether q sees k."""
ImagePattern = Callable[[int, int], MaskMod]
"""Function of grid and kernel that returns the mask between image positions, defined for q >= k in raster order."""

PATTERNS: dict[str, ImagePattern] = {}
"""Patterns between image positions, by the names that configs give them."""


def attention_pattern(function: ImagePattern) -> ImagePattern:
    """Register a function as the attention pattern of its name."""
    if function.__name__ in PATTERNS:
        raise UserError(f"an attention pattern named {function.__name__} already exists; rename the function")
    PATTERNS[function.__name__] = function
    return function


@attention_pattern
def full(grid: int, kernel: int) -> MaskMod:
    """Return the pattern in which each position sees all earlier codes."""
    return lambda q, k: q >= k


@attention_pattern
def row(grid: int, kernel: int) -> MaskMod:
    """Return the pattern in which each position sees the last `grid` codes, back to the one directly above."""
    return lambda q, k: q - k <= grid


@attention_pattern
def column(grid: int, kernel: int) -> MaskMod:
    """Return the pattern in which each position sees all codes above it in its column."""
    return lambda q, k: (q - k) % grid == 0


@attention_pattern
def conv(grid: int, kernel: int) -> MaskMod:
    """Return the pattern in which each position sees the upper half of a square of side `kernel` around it.

    Left and right of the image, the square continues in the row above or below, as raster order does.
    """
    radius = kernel // 2
    return lambda q, k: (q - k <= (grid + 1) * radius) & ((q - k + radius) % grid <= 2 * radius)


@cache
def _extent(kind: str, grid: int, kernel: int) -> tuple[int, bool]:
    """Return the largest distance at which a position sees another, and whether all see only their own column."""
    mask, position = PATTERNS[kind](grid, kernel), torch.arange(grid**2, device="cpu")
    lookback, is_column = 0, True
    for q in position[:, None].split(grid):  # one row of the image at a time, to save memory
        distance = torch.where((q >= position) & mask(q, position), q - position, 0)
        lookback = max(lookback, int(distance.amax()))
        is_column = is_column and not (distance % grid).any()
    return lookback, is_column


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Attention pattern of a sequence: `text_len` text positions, then `image_len` codes in raster order.

    Attention is causal. Every image position sees all text and the earlier codes of its kind (paper, footnote 7).
    """

    kind: str
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
    def image_mask(self) -> MaskMod:
        """Function that returns whether image position q sees image position k, for q >= k."""
        return PATTERNS[self.kind](self.grid, self.kernel)

    @property
    def is_causal(self) -> bool:
        """Whether every position sees all earlier positions, as in plain causal attention."""
        return self.kind == "full" or self.image_len == 0

    @property
    def lookback(self) -> int:
        """Largest distance from an image position to one that it sees."""
        return _extent(self.kind, self.grid, self.kernel)[0]

    @property
    def column_major(self) -> bool:
        """Whether each image position sees only its own column; kernels then process the image column by column."""
        return _extent(self.kind, self.grid, self.kernel)[1]

    def prefix(self, length: int) -> "Pattern":
        """Return the pattern of the sequence's first `length` positions."""
        text_len = min(length, self.text_len)
        return replace(self, text_len=text_len, image_len=length - text_len)

    @property
    def mask_mod(self) -> MaskMod:
        """Function that returns whether query position q sees key position k, in text or image."""
        image_mask, text_len = self.image_mask, self.text_len
        return lambda q, k: (q >= k) & ((k < text_len) | image_mask(q - text_len, k - text_len))

    def mask(self) -> Bool[Tensor, "s s"]:
        """Return the dense mask: True where a query (row) sees a key (column)."""
        position = torch.arange(self.length)
        return self.mask_mod(position[:, None], position)
