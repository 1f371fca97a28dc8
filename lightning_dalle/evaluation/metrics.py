"""Measures that torchmetrics does not have: codebook use, pairs found again, the real picture nearest to a made one.

Knows tensors. Knows nothing of models, files or logs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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


class Retrieval(Metric):
    """Which share of images finds its own caption among all, as the first or among the first five, and the other way
    round. One that is as near as the own counts as nearer: a model that gives all the same finds nothing.
    """

    full_state_update = False
    images: list[Tensor]
    texts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("texts", [], dist_reduce_fx="cat")

    def update(self, images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"]) -> None:
        """Unit vectors of pairs."""
        self.images.append(images.float())
        self.texts.append(texts.float())

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        images, texts = dim_zero_cat(self.images), dim_zero_cat(self.texts)
        found: dict[str, Tensor] = {}
        for name, asked, among in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            rank = torch.cat([_ranks(asked, among, start) for start in range(0, len(asked), 1024)])
            found |= {f"{name}_r{k}": (rank <= k).float().mean() for k in (1, 5)}
        return found


def _ranks(asked: Float[Tensor, "n d"], among: Float[Tensor, "n d"], start: int) -> Int[Tensor, " m"]:
    """How many are at least as near as the own one, itself counted, for a chunk of those that ask."""
    cosines = asked[start : start + 1024] @ among.T  # (m, n)
    own = cosines.gather(1, torch.arange(start, start + len(cosines), device=cosines.device)[:, None])
    return (cosines >= own).sum(dim=1)


class Nearest:
    """Finds for each image the reference at the least Euclidean distance of pixels.

    By products in float64; in float32 near ties such as two skin tones could flip.
    """

    def __init__(self, references: Float[Tensor, "m 3 h w"]) -> None:
        self.references = references.flatten(1).double()
        self.squares = torch.linalg.vector_norm(self.references, dim=1) ** 2

    def __call__(self, images: Float[Tensor, "n 3 h w"], chunk: int = 256) -> Int[Tensor, " n"]:
        return torch.cat([self._nearest(part.double()) for part in images.flatten(1).split(chunk)])

    def _nearest(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """By squared distances without x's own square, which all of a row have in common."""
        return torch.addmm(self.squares, x, self.references.T, alpha=-2).argmin(dim=1)
