"""Measures that torchmetrics does not have: codebook use, and which real picture a made one is nearest to.

Knows tensors. Knows nothing of models, files or logs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


def perplexity(counts: Int[Tensor, " k"]) -> Float[Tensor, ""]:
    """How many codes, used alike, would have the entropy of these: from 1 (collapse) to k."""
    return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()


class CodebookUse(Metric):
    """Counts codes; computes the perplexity of their distribution, from 1 (collapse) to the codebook size."""

    full_state_update = False
    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, codes: Int[Tensor, "*any"]) -> None:
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))

    def compute(self) -> Float[Tensor, ""]:
        return perplexity(self.counts)

    @property
    def dead(self) -> Int[Tensor, ""]:
        """Codes that were not used once."""
        return (self.counts == 0).sum()


def nearest(
    images: Float[Tensor, "n 3 h w"], references: Float[Tensor, "m 3 h w"], chunk: int = 256
) -> Int[Tensor, " n"]:
    """For each image the reference at the least Euclidean distance of pixels."""
    flat = references.flatten(1)
    exact = "donot_use_mm_for_euclid_dist"  # by products, near ties such as two skin tones could flip
    return torch.cat(
        [torch.cdist(part.flatten(1), flat, compute_mode=exact).argmin(dim=1) for part in images.split(chunk)]
    )
