"""FlexAttention for CUDA, which skips blocks of query-key pairs that the pattern hides entirely."""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_dalle.models.attention.patterns import Pattern


def flex(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """Return the attention output under a pattern, computed by FlexAttention.

    For column attention the image is reordered column by column, as in the paper (appendix B.1). Half of all blocks
    are then hidden entirely and skipped; in raster order none is.
    """
    mask = block_mask(pattern, q.device)
    if not pattern.column_major:
        return compiled()(q, k, v, block_mask=mask)
    order = column_major(pattern, q.device)
    return compiled()(q[:, :, order], k[:, :, order], v[:, :, order], block_mask=mask)[:, :, order.argsort()]


@cache
def compiled() -> Callable[..., Tensor]:
    """Return FlexAttention compiled to a fused kernel; uncompiled, it computes all query-key pairs."""
    return torch.compile(flex_attention, dynamic=False)


def column_major(pattern: Pattern, device: torch.device) -> Int[Tensor, " s"]:
    """Return the positions of a sequence in another order: the text first, then the image column by column."""
    column = torch.arange(pattern.image_len, device=device) % pattern.grid
    text = torch.arange(pattern.text_len, device=device)
    return torch.cat([text, pattern.text_len + column.argsort(stable=True)])


@lru_cache(maxsize=8)
def block_mask(pattern: Pattern, device: torch.device) -> BlockMask:
    """Return FlexAttention's block mask of a pattern, which all layers of that pattern share."""
    mask_mod, length = pattern.mask_mod, pattern.length
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        is_column_major = pattern.column_major
        position = column_major(pattern, device) if is_column_major else torch.arange(length, device=device)
        return create_block_mask(
            lambda b, h, q, k: mask_mod(position[q], position[k]), None, None, length, length, device=str(device)
        )
