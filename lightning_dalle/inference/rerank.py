"""Best-of-N reranking: score the candidates of one prompt and choose the best (section 2.6), batch by batch."""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_dalle.errors import UserError
from lightning_dalle.inference.scorers import Scorer, fingerprint


class Candidate(NamedTuple):
    """One of several images sampled for the same prompt, with its score."""

    number: int
    """Index among the candidates, from 0."""
    image: Float[Tensor, "3 h w"]
    score: float | None
    """Score, higher is better; None without a scorer."""


def sort_key(score: float | None) -> float:
    """Return the key that sorts candidates best first; a missing score counts as 0.

    Every choice in this module is a stable sort by this key, so the earlier of two equal candidates comes first.
    """
    return -(score or 0.0)


def score_candidates(
    images: Iterable[Float[Tensor, "3 h w"]], prompt: str, scorer: Scorer | None, batch_size: int = 64
) -> Iterator[Candidate]:
    """Yield the scored candidates of one prompt in order; raise a UserError if a score is NaN or infinite."""
    numbered = enumerate(images)
    while batch := list(itertools.islice(numbered, batch_size)):
        scores = [None] * len(batch)
        if scorer is not None:
            found = scorer.score(torch.stack([image for _, image in batch]), prompt)
            if not found.isfinite().all():
                raise UserError(
                    f"{fingerprint(scorer)} scores {prompt!r} with NaN or infinite values: choose another scorer"
                )
            scores = found.tolist()
        yield from (Candidate(number, image, score) for (number, image), score in zip(batch, scores, strict=True))


def rerank(candidates: Iterable[Candidate], top: int) -> list[Candidate]:
    """Return the `top` best candidates, best first, without holding more than those in memory."""
    return heapq.nsmallest(top, candidates, key=lambda candidate: sort_key(candidate.score))


def best_of_n(candidates: Iterable[Candidate], sizes: Sequence[int]) -> Iterator[tuple[int, Candidate]]:
    """Yield (n, best of the first n candidates) for each n in `sizes`, as in the paper's Fig. 6 and 9c."""

    def better(one: Candidate, other: Candidate) -> Candidate:
        return min(one, other, key=lambda candidate: sort_key(candidate.score))

    for n, best in enumerate(itertools.accumulate(candidates, better), start=1):
        if n in sizes:
            yield n, best


def expected_best_of_n(values: Sequence[float | bool], scores: Sequence[float], n: int) -> float:
    """Return the value of the best-scored of n candidates, averaged over all n-subsets of the candidates.

    Of m candidates, the k-th best (from 0) is the best one in comb(m - 1 - k, n - 1) of the comb(m, n) subsets.

    Args:
        values: value of each candidate, to be averaged.
        scores: score of each candidate, to choose the best.
        n: size of the subsets, at most the number of candidates.
    """
    best_first = sorted(range(len(scores)), key=lambda i: sort_key(scores[i]))
    num_subsets = math.comb(len(scores), n)
    num_worse = range(len(scores) - 1, -1, -1)
    chances = [math.comb(worse, n - 1) / num_subsets for worse in num_worse]  # integers: floats would overflow
    return sum(values[i] * chance for i, chance in zip(best_first, chances, strict=True))
