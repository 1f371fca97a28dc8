"""Attention under a pattern by FlexAttention, which passes over blocks of pairs that the pattern hides whole: for CUDA.

Knows queries, keys, values and patterns. Knows nothing of when it is the form to choose.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_dalle.models.attention.patterns import Pattern


def block_sparse(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """What each position of a whole stream takes from those that it sees.

    An image's columns are made to stand together, as in the paper (appendix B.1): in raster order no block is hidden
    whole, by columns half of them are.
    """
    seen = block_mask(pattern, q.device)
    if pattern.kind != "column":
        return compiled()(q, k, v, block_mask=seen)
    order = by_columns(pattern, q.device)
    return compiled()(q[:, :, order], k[:, :, order], v[:, :, order], block_mask=seen)[:, :, order.argsort()]


@cache
def compiled() -> Callable[..., Tensor]:
    """FlexAttention is a kernel only when compiled."""
    return torch.compile(flex_attention, dynamic=False)


def by_columns(pattern: Pattern, device: torch.device) -> Int[Tensor, " s"]:
    """The stream's positions, the image's column by column."""
    column = torch.arange(pattern.image_len, device=device) % pattern.grid
    text = torch.arange(pattern.text_len, device=device)
    return torch.cat([text, pattern.text_len + column.argsort(stable=True)])


@lru_cache(maxsize=8)
def block_mask(pattern: Pattern, device: torch.device) -> BlockMask:
    """Which blocks are looked at, and which of them whole; one for all layers that share a pattern."""
    length, sees = pattern.text_len + pattern.image_len, pattern.sees
    with torch.inference_mode(False):  # else no gradient could be taken through what keeps it
        position = by_columns(pattern, device) if pattern.kind == "column" else torch.arange(length, device=device)
        return create_block_mask(
            lambda b, h, q, k: sees(position[q], position[k]), None, None, length, length, device=str(device)
        )
