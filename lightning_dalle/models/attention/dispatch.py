"""Attention under a pattern, in the cheapest form that is exact.

Knows queries, keys, values and patterns. Knows nothing of weights, layers or caches.

The forms, whose costs `benchmarks/attention.py` measures:

- masked: all pairs, those that the pattern hides left out; where it hides only what follows, by the kernel's own flag.
- windowed (CPU): text apart; the image in blocks of positions, each with the window of keys that holds all it sees.
- block-sparse (CUDA): see `models/attention/flex.py`.

Letters of shapes: m = batch times heads, t text positions, i image positions, n blocks of q queries with k keys each.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from lightning_dalle.models.attention.patterns import Pattern

BLOCK = 64
"""Queries that share a window: with more, a window holds more that few of them see; with fewer, products get small."""

SHORT = 512
"""Positions up to which all pairs are quickest by plain products in 16 bits on a CPU, whose attention kernel takes
longer in 16 than in 32. The backward wants all pairs kept, and a longer stream has too many of them."""


def attend(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """What each position of a stream, or of its beginning, takes from those that it sees.

    One softmax over all of them, text and image (paper, footnote 7). All forms give the same up to the order of sums;
    in 16 bits on a CPU logits and weights are rounded to 16 bits on either side of a softmax in 32.
    """
    pattern = pattern.beginning(q.shape[2])
    if q.device.type == "cuda" and is_for_blocks(pattern, q.shape[3]):
        from lightning_dalle.models.attention.flex import block_sparse  # seconds of imports, of use on CUDA alone

        return block_sparse(q, k, v, pattern)
    if q.device.type == "cpu" and is_for_windows(pattern, q.dtype):
        return windowed(q, k, v, pattern)
    return masked(q, k, v, pattern)


def is_for_windows(pattern: Pattern, dtype: torch.dtype) -> bool:
    """Are windows quicker than all pairs? Where they hold at most half of them, unless the stream is so short that many
    small products cost more than is saved (`benchmarks/attention.py`: 320 positions are enough in 32 bits)."""
    t, i = pattern.text_len, pattern.image_len
    keys = t + (i // pattern.grid if pattern.kind == "column" else pattern.reach + BLOCK)
    return t + i > (SHORT if dtype.itemsize == 2 else 256) and 2 * i * keys + t**2 < (t + i) ** 2


def is_for_blocks(pattern: Pattern, head_dim: int) -> bool:
    """FlexAttention passes over blocks of 128 by 128 pairs, of which a short stream has few; its heads are no narrower
    than 16."""
    return not pattern.is_causal and pattern.text_len + pattern.image_len > 512 and head_dim >= 16


def masked(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """All pairs, those that the pattern hides left out."""
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[2] <= SHORT:
        bias = mask_bias(pattern, q.device, q.dtype)
        logits = torch.baddbmm(bias, flat(q), flat(k).mT, alpha=q.shape[3] ** -0.5)  # (m, s, s)
        return (logits.softmax(-1) @ flat(v)).view(q.shape)
    if pattern.is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_bias(pattern, q.device, q.dtype))


def windowed(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """Text apart; the image in blocks of positions, each with the window of keys that holds all it sees."""
    sizes = [pattern.text_len, pattern.image_len]
    (q_text, q_image), (k_text, k_image), (v_text, v_image) = (x.split(sizes, dim=2) for x in (q, k, v))
    over = over_both_16 if q.dtype.itemsize == 2 else OverBoth.apply
    image = over(
        blocks(flat(q_image), pattern),
        flat(k_text),
        flat(v_text),
        windows(flat(k_image), pattern),
        windows(flat(v_image), pattern),
        window_bias(pattern, q.device, q.dtype),
    )
    text = masked(q_text, k_text, v_text, pattern.beginning(pattern.text_len))
    return torch.cat([text, in_stream(image, pattern).view(q_image.shape)], dim=2)


def flat(x: Float[Tensor, "b h s d"]) -> Float[Tensor, "m s d"]:
    """Each head of each example a stream of its own."""
    return x.reshape(-1, *x.shape[2:])


def blocks(x: Shaped[Tensor, "m i d"], pattern: Pattern) -> Shaped[Tensor, "m n q d"]:
    """An image's positions in blocks, its columns or stretches of its raster, filled up with zeros at the end."""
    if pattern.kind == "column":  # the paper transposes the image's states as well (appendix B.1, Fig. 11 c)
        whole = F.pad(x, (0, 0, 0, -x.shape[1] % pattern.grid))
        return whole.unflatten(1, (-1, pattern.grid)).transpose(1, 2).contiguous()
    return F.pad(x, (0, 0, 0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def windows(x: Shaped[Tensor, "m i d"], pattern: Pattern) -> Shaped[Tensor, "m n k d"]:
    """For each block the positions in which all lies that it sees, zeros before the first."""
    if pattern.kind == "column":
        return blocks(x, pattern)
    padded = F.pad(x, (0, 0, pattern.reach, -x.shape[1] % BLOCK))
    return Overlapping.apply(padded, pattern.reach + BLOCK)


def in_stream(x: Float[Tensor, "m n q d"], pattern: Pattern) -> Float[Tensor, "m i d"]:
    """Inverse of `blocks`."""
    raster = x.transpose(1, 2) if pattern.kind == "column" else x
    return raster.flatten(1, 2)[:, : pattern.image_len]


class Overlapping(torch.autograd.Function):
    """Windows of `width` positions from every `BLOCK`th on, a view; its backward is quicker than `Tensor.unfold`'s."""

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


def over_both_16(
    q: Float[Tensor, "m n q d"],
    k_text: Float[Tensor, "m t d"],
    v_text: Float[Tensor, "m t d"],
    k: Float[Tensor, "m n k d"],
    v: Float[Tensor, "m n k d"],
    bias: Float[Tensor, "1 n q k"],
) -> Float[Tensor, "m n q d"]:
    """One softmax over text and windows by plain products, which is the quickest way in 16 bits."""
    q = q * q.shape[3] ** -0.5
    to_text = (q.flatten(1, 2) @ k_text.mT).unflatten(1, q.shape[1:3])  # (m, n, q, t)
    to_window = q @ k.mT + bias  # (m, n, q, k)
    weight = torch.cat([to_text, to_window], dim=-1).softmax(-1)
    on_text, on_window = weight.split([k_text.shape[1], k.shape[2]], dim=-1)
    return (on_text.flatten(1, 2) @ v_text).view(q.shape) + on_window @ v


class OverBoth(torch.autograd.Function):
    """One softmax over text and windows by two calls of the CPU's attention kernel, which never holds all logits.

    Each call gives its sum of exponentials, so that the two can be weighed against each other; in the backward each is
    given both's sum and both's result, and so takes its own part of the one softmax. PyTorch's public function gives no
    such sums: these are the two operators behind it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "m n q d"],
        k_text: Float[Tensor, "m t d"],
        v_text: Float[Tensor, "m t d"],
        k: Float[Tensor, "m n k d"],
        v: Float[Tensor, "m n k d"],
        bias: Float[Tensor, "1 n q k"],
    ) -> Float[Tensor, "m n q d"]:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        from_text, log_text = attention(q.flatten(1, 2)[None], k_text[None], v_text[None])
        from_window, log_window = attention(q, k, v, attn_mask=bias)
        from_text, log_text = from_text.view(q.shape), log_text.reshape(q.shape[:3])
        log_both = torch.logaddexp(log_text, log_window)
        y = from_text.lerp(from_window, (log_window - log_both).exp()[..., None])
        ctx.save_for_backward(q, k_text, v_text, k, v, bias, y, log_both)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "m n q d"]) -> tuple[Tensor | None, ...]:
        q, k_text, v_text, k, v, bias, y, log_both = ctx.saved_tensors
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        whole = [x.flatten(1, 2)[None] for x in (gradient, q, y, log_both)]  # one call over text for all blocks
        text = attention(*whole[:2], k_text[None], v_text[None], *whole[2:], 0.0, False)
        window = attention(gradient.contiguous(), q, k, v, y, log_both, 0.0, False, attn_mask=bias)
        of_q = text[0].view(q.shape) + window[0]
        return of_q, text[1][0], text[2][0], window[1], window[2], None


@lru_cache(maxsize=8)
def mask_bias(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "s s"]:
    """What is added to the logits of all pairs: nothing, or minus infinity; one for all layers that share a pattern."""
    with torch.inference_mode(False):  # else no gradient could be taken through what keeps it
        return as_bias(pattern.mask().to(device), dtype)


@lru_cache(maxsize=8)
def window_bias(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "1 n q k"]:
    """The same for each query of each block, and its window: positions are laid out as queries and keys are."""
    with torch.inference_mode(False):
        position = torch.arange(1, pattern.image_len + 1, device=device).view(1, -1, 1)  # a filling zero is nobody's
        q, k = blocks(position, pattern) - 1, windows(position, pattern).mT - 1
        sees_itself = q == k  # so does what only fills: a softmax over nothing is no number
        return as_bias(sees_itself | (k >= 0) & (q >= k) & pattern.near(q, k), dtype)


def as_bias(seen: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Nothing where a query sees a key, else minus infinity."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
