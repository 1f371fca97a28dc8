"""Attention under a pattern, in the cheapest form that is exact.

Knows queries, keys, values and patterns. Knows nothing of weights, layers or caches.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_dalle.models.masks import Pattern


def attend(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """What each position of a stream, or of its beginning, takes from those that it sees.

    One softmax over all of them, text and image (paper, footnote 7).
    """
    return masked(q, k, v, pattern)


def masked(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """The reference: all pairs, those that the pattern hides left out."""
    s = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_on(q.device, pattern)[:s, :s])


@lru_cache(maxsize=8)
def mask_on(device: torch.device, pattern: Pattern) -> Bool[Tensor, "s s"]:
    """One for all layers that share it."""
    with torch.inference_mode(False):  # else no gradient could be taken through what keeps it
        return pattern.mask().to(device)
