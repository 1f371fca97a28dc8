"""Measures that torchmetrics lacks: codebook perplexity, retrieval of pairs, PSNR with an interval, nearest images."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_dalle.evaluation.statistics import mean


def perplexity(counts: Int[Tensor, " k"]) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of code counts: 1 if one code is used, k if all are used equally often."""
    return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()


def psnr(squared_errors: Sequence[float]) -> dict[str, Any]:
    """Return PSNR in dB with its 95 % interval, from each image's mean squared error of pixels in [0, 1]."""

    def decibel(error: float) -> float:
        return -10 * math.log10(max(error, 1e-10))

    error = mean(squared_errors)
    low, high = error["ci95"] or (error["value"], error["value"])
    return {
        "value": decibel(error["value"]),
        "ci95": [decibel(high), decibel(low)],
        "of": "the mean squared error over all pixels of all images in [0, 1]",
    }


class CodebookPerplexity(Metric):
    """Perplexity of the codes of all batches, from 1 (only one code is used) to the codebook size."""

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
    def num_unused(self) -> Int[Tensor, ""]:
        """Number of codebook entries that no image used."""
        return (self.counts == 0).sum()


class RetrievalRecall(Metric):
    """Recall at 1 and 5 of images by their captions and of captions by their images. Ties count as misses, so a model
    whose embeddings are all equal retrieves nothing.
    """

    full_state_update = False
    images: list[Tensor]
    texts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("texts", [], dist_reduce_fx="cat")

    def update(self, images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"]) -> None:
        """Add embeddings of unit length; row i of `images` and of `texts` belong together."""
        self.images.append(images.float())
        self.texts.append(texts.float())

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        images, texts = dim_zero_cat(self.images), dim_zero_cat(self.texts)
        recall: dict[str, Tensor] = {}
        for name, queries, keys in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            ranks = torch.cat([_ranks(queries, keys, start) for start in range(0, len(queries), 1024)])
            recall |= {f"{name}_r{k}": (ranks <= k).float().mean() for k in (1, 5)}
        return recall


def _ranks(queries: Float[Tensor, "n d"], keys: Float[Tensor, "n d"], start: int) -> Int[Tensor, " m"]:
    """Return the rank, from 1, of the key that matches each of 1,024 queries; keys of equal cosine rank before it."""
    cosines = queries[start : start + 1024] @ keys.T  # (m, n)
    own = cosines.gather(1, torch.arange(start, start + len(cosines), device=cosines.device)[:, None])
    return (cosines >= own).sum(dim=1)


class NearestImages:
    """Search for the reference image with the least Euclidean distance of pixels to an image.

    The distances are computed in float64, since float32 could swap near ties such as two skin tones.
    """

    def __init__(self, references: Float[Tensor, "m 3 h w"]) -> None:
        self.references = references.flatten(1).double()
        self.squares = torch.linalg.vector_norm(self.references, dim=1) ** 2

    def __call__(self, images: Float[Tensor, "n 3 h w"], chunk: int = 256) -> Int[Tensor, " n"]:
        """Return the index of the reference image nearest to each image."""
        # The squared norm of x is left out: it is the same for all references.
        parts = (part.double() for part in images.flatten(1).split(chunk))
        return torch.cat([torch.addmm(self.squares, x, self.references.T, alpha=-2).argmin(dim=1) for x in parts])
