"""Choice of the fastest exact attention kernel for a pattern, by the measurements of `benchmarks/attention.py`."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_dalle.models.attention.dense import DENSE_MAX_LEN, dense
from lightning_dalle.models.attention.local import BLOCK, local
from lightning_dalle.models.attention.patterns import Pattern


def attend(
    q: Float[Tensor, "b h s d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], pattern: Pattern
) -> Float[Tensor, "b h s d"]:
    """Return the attention output at each position of a sequence or of its prefix.

    One softmax covers text and image (paper, footnote 7). All kernels agree up to the order of sums. In 16 bits on a
    CPU, logits and weights are rounded to 16 bits before and after the softmax.
    """
    pattern = pattern.prefix(q.shape[2])
    if q.device.type == "cuda" and use_flex(pattern, q.shape[3]):
        from lightning_dalle.models.attention.flex import flex  # takes seconds to import, and only CUDA needs it

        return flex(q, k, v, pattern)
    if q.device.type == "cpu" and use_local(pattern, q.dtype):
        return local(q, k, v, pattern)
    return dense(q, k, v, pattern)


def use_local(pattern: Pattern, dtype: torch.dtype) -> bool:
    """Return whether the local kernel is faster on a CPU than the dense one.

    It must compute at most half of all pairs, in a sequence long enough to repay many small matrix products.
    """
    t, i = pattern.text_len, pattern.image_len
    keys = t + (i // pattern.grid if pattern.image.column_major else pattern.lookback + BLOCK)
    return t + i > (DENSE_MAX_LEN if dtype.itemsize == 2 else 256) and 2 * i * keys + t**2 < (t + i) ** 2


def use_flex(pattern: Pattern, head_dim: int) -> bool:
    """Return whether FlexAttention can skip enough of its 128x128 blocks; its heads have at least 16 channels."""
    return not pattern.is_causal and pattern.length > 512 and head_dim >= 16
