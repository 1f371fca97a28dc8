"""Choice of the fastest exact attention kernel for a pattern, as measured by `benchmarks/attention.py`."""

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

    One softmax covers text and image (paper, footnote 7). The kernels differ only in the order of sums. In 16 bits on
    a CPU, they also round the logits and the attention weights to 16 bits.
    """
    pattern = pattern.prefix(q.shape[2])
    if q.device.type == "cuda" and use_flex(pattern, q.shape[3]):
        from lightning_dalle.models.attention.flex import flex  # takes seconds to import, and only CUDA needs it

        return flex(q, k, v, pattern)
    if q.device.type == "cpu" and use_local(pattern, q.dtype):
        return local(q, k, v, pattern)
    return dense(q, k, v, pattern)


def use_local(pattern: Pattern, dtype: torch.dtype) -> bool:
    """Return whether attention within local windows is faster on a CPU than dense attention with a mask.

    It is, if the windows hold less than half of all query-key pairs and the sequence is long enough to repay many small
    matrix products.
    """
    t, i = pattern.text_len, pattern.image_len
    keys = t + (i // pattern.grid if pattern.column_major else pattern.lookback + BLOCK)
    return t + i > (DENSE_MAX_LEN if dtype.itemsize == 2 else 256) and 2 * i * keys + t**2 < (t + i) ** 2


def use_flex(pattern: Pattern, head_dim: int) -> bool:
    """Return whether FlexAttention is faster on a GPU than dense attention; its heads must have at least 16 channels.

    It is, if the sequence is long enough to have 128x128 blocks of hidden query-key pairs, which it skips.
    """
    return not pattern.is_causal and pattern.length > 512 and head_dim >= 16
