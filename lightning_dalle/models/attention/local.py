"""Local attention for CPUs: image queries in blocks, each with the text and the window of image keys that it may see.

Letters in shapes: m is batch times heads, t text positions, i image positions, n blocks of q queries with k keys each.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from lightning_dalle.models.attention.dense import additive, dense, flatten_heads
from lightning_dalle.models.attention.patterns import Pattern

BLOCK = 64
"""Number of queries in a block. Larger blocks compute more masked pairs; smaller ones slow the matrix products."""


def local(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """Return the attention output under a pattern: text queries by dense attention, image queries in blocks."""
    sizes = [pattern.text_len, pattern.image_len]
    (q_text, q_image), (k_text, k_image), (v_text, v_image) = (x.split(sizes, dim=2) for x in (q, k, v))
    image = joint_attention(
        blocks(flatten_heads(q_image), pattern),
        flatten_heads(k_text),
        flatten_heads(v_text),
        windows(flatten_heads(k_image), pattern),
        windows(flatten_heads(v_image), pattern),
        window_bias(pattern, q.device, q.dtype),
    )
    text = dense(q_text, k_text, v_text, pattern.prefix(pattern.text_len))
    return torch.cat([text, unblock(image, pattern).view(q_image.shape)], dim=2)


def joint_attention(
    q: Float[Tensor, "m n q d"],
    k_text: Float[Tensor, "m t d"],
    v_text: Float[Tensor, "m t d"],
    k: Float[Tensor, "m n k d"],
    v: Float[Tensor, "m n k d"],
    bias: Float[Tensor, "1 n q k"],
) -> Float[Tensor, "m n q d"]:
    """Return the output of image queries, with one softmax over the text and the window of each block."""
    q = q * q.shape[3] ** -0.5
    text_logits = (q.flatten(1, 2) @ k_text.mT).unflatten(1, q.shape[1:3])  # (m, n, q, t)
    window_logits = q @ k.mT + bias  # (m, n, q, k)
    weights = torch.cat([text_logits, window_logits], dim=-1).softmax(-1)
    text_weights, window_weights = weights.split([k_text.shape[1], k.shape[2]], dim=-1)
    return (text_weights.flatten(1, 2) @ v_text).view(q.shape) + window_weights @ v


def blocks(x: Shaped[Tensor, "m i d"], pattern: Pattern) -> Shaped[Tensor, "m n q d"]:
    """Split image positions into blocks: columns or, in raster order, runs of `BLOCK`. Pad the last with zeros."""
    if pattern.column_major:  # the paper transposes the image's states as well (appendix B.1, Fig. 11 c)
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % pattern.grid))
        return padded.unflatten(1, (-1, pattern.grid)).transpose(1, 2).contiguous()
    return F.pad(x, (0, 0, 0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def windows(x: Shaped[Tensor, "m i d"], pattern: Pattern) -> Shaped[Tensor, "m n k d"]:
    """Return, for each block, the image positions that its queries may see, with zeros before the first."""
    if pattern.column_major:
        return blocks(x, pattern)
    padded = F.pad(x, (0, 0, pattern.lookback, -x.shape[1] % BLOCK))
    return OverlappingWindows.apply(padded, pattern.lookback + BLOCK)


def unblock(x: Float[Tensor, "m n q d"], pattern: Pattern) -> Float[Tensor, "m i d"]:
    """Merge blocks into raster order; inverse of `blocks`."""
    raster = x.transpose(1, 2) if pattern.column_major else x
    return raster.flatten(1, 2)[:, : pattern.image_len]


class OverlappingWindows(torch.autograd.Function):
    """View of windows that start `BLOCK` positions apart; its backward is faster than that of `Tensor.unfold`."""

    @staticmethod
    def forward(ctx: Any, x: Shaped[Tensor, "m s d"], width: int) -> Shaped[Tensor, "m n k d"]:
        ctx.length = x.shape[1]
        return x.unfold(1, width, BLOCK).mT

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "m n k d"]) -> tuple[Float[Tensor, "m s d"], None]:
        m, n, _, d = gradient.shape
        parts = gradient.split(BLOCK, dim=2)
        total = gradient.new_zeros(m, n + len(parts) - 1, BLOCK, d)
        for first, part in enumerate(parts):
            total[:, first : first + n, : part.shape[2]] += part
        return total.flatten(1, 2)[:, : ctx.length], None


@lru_cache(maxsize=8)
def window_bias(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "1 n q k"]:
    """Return a pattern's additive mask of each block's queries over its window; all layers of that pattern share it."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        position = torch.arange(1, pattern.image_len + 1, device=device).view(1, -1, 1)  # 0 marks padding
        q, k = blocks(position, pattern) - 1, windows(position, pattern).mT - 1
        is_padding = (q < 0) & (k < 0)  # padding sees padding: a softmax over no keys is NaN
        return additive(is_padding | (k >= 0) & (q >= k) & pattern.image_mask(q, k), dtype)
