"""Dense attention: computes all query-key pairs and masks those that the pattern hides."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_dalle.models.attention.patterns import Pattern

DENSE_MAX_LEN = 512
"""Longest sequence for which `dense` uses plain matrix products in 16 bits on a CPU.

PyTorch's fused CPU attention is slower in 16 bits than in 32. Plain products are faster, but keep the weights of all
query-key pairs for the backward pass, which takes too much memory in longer sequences.
"""


def dense(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """Return the attention output, computed over all query-key pairs with the pattern's mask."""
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[2] <= DENSE_MAX_LEN:
        bias = mask_bias(pattern, q.device, q.dtype)
        logits = torch.baddbmm(bias, flatten_heads(q), flatten_heads(k).mT, alpha=q.shape[3] ** -0.5)  # (m, s, s)
        return (logits.softmax(-1) @ flatten_heads(v)).view(q.shape)
    if pattern.is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_bias(pattern, q.device, q.dtype))


def flatten_heads(x: Float[Tensor, "b h s d"]) -> Float[Tensor, "m s d"]:
    """Merge the batch and head axes: m = b h."""
    return x.reshape(-1, *x.shape[2:])


@lru_cache(maxsize=8)
def mask_bias(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "s s"]:
    """Return a pattern's additive mask of all query-key pairs, which all layers of that pattern share."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        return additive(pattern.mask().to(device), dtype)


def additive(visible: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Return the additive attention mask: 0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)
