"""Samplers, which determine the order of rows on disk. Seed and epoch alone determine the order of an epoch.

The module `loader` resumes them. Streamed data has no samplers; the module `streaming` orders it.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_dalle.errors import UserError


class SampleIndex(NamedTuple):
    """Index of one use of a record, which seeds the augmentation, the choice of a caption and the BPE dropout."""

    epoch: int
    """Epoch of the record's source, from 0. In a mixture, small sources have more epochs than large ones."""
    record: int | str
    """Row number of the record, or its id in streamed data."""

    @classmethod
    def of(cls, index: "SampleIndex | int") -> "SampleIndex":
        """Return a sample index as it is, and a row number, as samplers of torch yield, in epoch 0."""
        return index if isinstance(index, SampleIndex) else cls(0, index)

    def image_rng(self, seed: int) -> random.Random:
        """Return the random generator of the image's augmentation."""
        return random.Random(f"{seed} {self.epoch} {self.record} picture")

    def caption_rng(self, seed: int) -> random.Random:
        """Return the random generator of the choice among captions and of the BPE dropout."""
        return random.Random(f"{seed} {self.epoch} {self.record}")


class ResumableSampler(DistributedSampler[Any]):
    """Sampler of one rank, whose next iteration can skip the indices that an interrupted run read."""

    num_read = 0
    """Number of indices to skip in the next iteration."""

    def indices(self) -> Iterator[SampleIndex]:
        """Yield the indices of the whole epoch on this rank."""
        for record in super().__iter__():
            yield SampleIndex(self.epoch, record)

    def __iter__(self) -> Iterator[SampleIndex]:
        num_read, self.num_read = self.num_read, 0
        return itertools.islice(self.indices(), num_read, None)


class HardNegativeSampler(ResumableSampler):
    """Sampler that puts records with similar captions side by side, as hard negatives of a contrastive loss.

    Records are sorted by the rarest words of their captions and cut into groups, whose order is shuffled. So "man
    surfing" and "woman surfing" often come in the same batch.
    """

    def __init__(self, captions: Sequence[str], group_size: int, **options: Any) -> None:
        super().__init__(captions, **options)  # type: ignore[arg-type]
        count = Counter(word for caption in captions for word in set(caption.split()))

        def rarest_first(record: int) -> list[tuple[int, str]]:
            return sorted((count[word], word) for word in captions[record].split())

        self.sorted, self.group_size = sorted(range(len(captions)), key=rarest_first), group_size

    def indices(self) -> Iterator[SampleIndex]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        first = rng.randrange(self.group_size)  # shifts the cuts, so that groups differ between epochs
        starts = range(first, len(self.sorted), self.group_size)
        groups = [self.sorted[:first], *(self.sorted[start : start + self.group_size] for start in starts)]
        rng.shuffle(groups)
        order = [record for group in groups for record in group]
        for record in order[self.rank : self.total_size : self.num_replicas]:
            yield SampleIndex(self.epoch, record)


class EvalSampler(ResumableSampler, SequentialSampler):  # type: ignore[misc]
    """Sampler of every record once over all ranks, unpadded, in stored order. `overfit_batches` keeps it in place."""

    def indices(self) -> Iterator[SampleIndex]:
        for record in range(self.rank, len(self.dataset), self.num_replicas):  # type: ignore[arg-type]
            yield SampleIndex(0, record)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class FixedSampler(ResumableSampler):
    """Sampler of a given list of indices. Each rank may have another list."""

    def __init__(self, indices: Sequence[SampleIndex]) -> None:
        super().__init__(indices, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]

    def indices(self) -> Iterator[SampleIndex]:
        return iter(self.dataset)


class MixtureSampler(ResumableSampler):
    """Sampler of a mixture of sources in the proportion of their weights; an epoch has as many indices as rows.

    Each source is read in successive permutations, which continue across epochs of the mixture. The epoch of an index
    is the number of its permutation, so a record that comes twice in one epoch is augmented differently. The column
    `source` of the rows contains the index of the source, from 0.
    """

    def __init__(self, rows: Dataset, weights: Sequence[float], **options: Any) -> None:
        super().__init__(rows, **options)
        origins = torch.tensor(rows["source"][:])
        self.members = [(origins == source).nonzero().flatten() for source in range(len(weights))]
        empty = [str(source) for source, members in enumerate(self.members) if not len(members)]
        if empty:
            raise UserError(
                f"the filters reject all records of source {' and '.join(empty)} of the mixture (counted from 0); "
                "loosen data.filters or remove the source"
            )
        ends = (torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights) * len(rows)).round().long()
        self.counts = ends.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()

    def indices(self) -> Iterator[SampleIndex]:
        indices = [index for source in range(len(self.members)) for index in self._indices_of(source)]
        order = torch.randperm(len(indices), generator=self._generator(-1, self.epoch))[: self.total_size]
        for i in order[self.rank :: self.num_replicas].tolist():
            yield indices[i]

    def _indices_of(self, source: int) -> Iterator[SampleIndex]:
        members, count = self.members[source], self.counts[source]
        start, stop = self.epoch * count, (self.epoch + 1) * count
        for permutation in range(start // len(members), -(-stop // len(members))):
            order = members[torch.randperm(len(members), generator=self._generator(source, permutation))]
            offset = permutation * len(members)
            for record in order[max(0, start - offset) : stop - offset].tolist():
                yield SampleIndex(permutation, record)

    def _generator(self, source: int, number: int) -> torch.Generator:
        seed = hash((self.seed, source, number))  # a hash of integers is the same in every process
        return torch.Generator().manual_seed(seed % 2**63)
