"""The best of many candidates by a scorer, a batch of images in memory at a time (paper, section 2.6).

Knows images, a caption and scores. Knows nothing of how images are made or kept.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_dalle.errors import UserError
from lightning_dalle.inference.scorers import Scorer, identity


class Candidate(NamedTuple):
    """One of several images of a caption."""

    number: int
    """Which of the candidates, from 0."""
    image: Float[Tensor, "3 h w"]
    score: float | None
    """Of the scorer, if there is one."""


def scored(
    images: Iterable[Float[Tensor, "3 h w"]], caption: str, scorer: Scorer | None, batch_size: int = 64
) -> Iterator[Candidate]:
    """Candidates of one caption in the order that they come in, scored a batch at a time.

    Raises:
        UserError: if a score is no number: nothing is better or worse than that.
    """
    numbered = enumerate(images)
    while batch := list(itertools.islice(numbered, batch_size)):
        scores = [None] * len(batch)
        if scorer is not None:
            found = scorer.score(torch.stack([image for _, image in batch]), caption)
            if not found.isfinite().all():
                raise UserError(f"the scorer {identity(scorer)} gives scores of {caption!r} that are no numbers")
            scores = found.tolist()
        yield from (Candidate(number, image, score) for (number, image), score in zip(batch, scores, strict=True))


def best_first(candidates: Iterable[Candidate], top: int) -> list[Candidate]:
    """The `top` best by score, the earlier of two equal ones first; without scores the first ones.

    No more than `top` candidates are held.
    """
    return heapq.nlargest(top, candidates, key=lambda candidate: candidate.score or 0.0)


def best_of(candidates: Iterable[Candidate], sizes: tuple[int, ...]) -> Iterator[tuple[int, Candidate]]:
    """The best of the first n candidates for each rising n, as in the nested sets of Fig. 6 and 9c."""
    best: Candidate | None = None
    for candidate in candidates:
        if best is None or (candidate.score or 0.0) > (best.score or 0.0):
            best = candidate
        if candidate.number + 1 in sizes:
            yield candidate.number + 1, best
