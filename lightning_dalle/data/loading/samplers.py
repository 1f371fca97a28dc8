"""Which record is used when: the order of an epoch, and the randomness of each use.

Knows seeds and processes. Knows nothing of what a record holds but its captions.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import DistributedSampler

from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer


class Draw(NamedTuple):
    """One use of one record: all randomness of it hangs on these two numbers."""

    epoch: int
    record: int | str
    """Its number among the rows, or its id where they are streamed and have none."""

    def picture(self, seed: int) -> random.Random:
        """The randomness of its picture's augmentation; its caption has its own."""
        return random.Random(f"{seed} {self.epoch} {self.record} picture")

    def caption(
        self, captions: list[str], tokenizer: CaptionTokenizer, bpe_dropout: float, seed: int
    ) -> tuple[list[int], bool, str]:
        """One of the record's captions as tokens, whether it was cut, and as it was written."""
        rng = random.Random(f"{seed} {self.epoch} {self.record}")
        caption = rng.choice(captions)
        ids, is_cut = tokenizer.pad(tokenizer.encode(caption, bpe_dropout, rng))
        return ids, is_cut, caption


class Draws(DistributedSampler[Any]):
    """The draws of an epoch: a permutation that depends on seed and epoch alone, split between processes.

    A resumed epoch goes on behind the draws that were read. Lightning has a loader go to its place before it says which
    epoch it is, and leaves it there if that was an epoch's end: so the epoch is part of the state.
    """

    read = 0
    """Draws of this epoch that are behind it."""
    resumed = (0, 0)
    """An epoch, and how many draws of it were read before."""

    def draws(self) -> Iterator[Draw]:
        """Of the epoch, in this process."""
        for index in super().__iter__():
            yield Draw(self.epoch, index)

    def __iter__(self) -> Iterator[Draw]:
        epoch, read = self.resumed
        self.read, self.resumed = read if epoch == self.epoch else 0, (0, 0)
        for draw in itertools.islice(self.draws(), self.read, None):
            self.read += 1
            yield draw

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes there with the next iteration."""
        self.set_epoch(state["epoch"])
        self.resumed = (state["epoch"], state["read"])


class Alike(Draws):
    """The draws of an epoch in runs of records whose captions share their rarest words, so that a batch holds what is
    easily taken for one another: "man surfing" beside "woman surfing", of every skin tone.

    Args:
        captions: one of each record.
        run: records that stand together.
        **options: of `Draws`.
    """

    def __init__(self, captions: Sequence[str], run: int, **options: Any) -> None:
        super().__init__(captions, **options)  # type: ignore[arg-type]
        count = Counter(word for caption in captions for word in set(caption.split()))

        def rarest_first(record: int) -> list[tuple[int, str]]:
            return sorted((count[word], word) for word in captions[record].split())

        self.sorted, self.run = sorted(range(len(captions)), key=rarest_first), run

    def draws(self) -> Iterator[Draw]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        first = rng.randrange(self.run)  # that the runs are not the same in every epoch
        starts = range(first, len(self.sorted), self.run)
        runs = [self.sorted[:first], *(self.sorted[start : start + self.run] for start in starts)]
        rng.shuffle(runs)
        order = [record for run in runs for record in run]
        for index in order[self.rank : self.total_size : self.num_replicas]:
            yield Draw(self.epoch, index)


class Once(Draws):
    """Every record once, split between processes without the padding that would count some twice."""

    def draws(self) -> Iterator[Draw]:
        for index in range(self.rank, len(self.dataset), self.num_replicas):  # type: ignore[arg-type]
            yield Draw(0, index)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class Assigned(Draws):
    """The draws that this process was given, in their order."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        super().__init__(draws, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]

    def draws(self) -> Iterator[Draw]:
        return iter(self.dataset)


class MixedDraws(Draws):
    """The draws of an epoch from a mixture's rows: as many as there are, in the proportion of the weights.

    A source's draws go on through its permutations from epoch to epoch. A draw's epoch is the number of the
    permutation, so that a record that comes twice in an epoch of the mixture is drawn anew.

    Args:
        rows: with the column `source`.
        weights: of the sources.
        **kwargs: of a `DistributedSampler`.
    """

    def __init__(self, rows: Dataset, weights: Sequence[float], **kwargs: Any) -> None:
        super().__init__(rows, **kwargs)
        origins = torch.tensor(rows["source"][:])
        self.members = [(origins == source).nonzero().flatten() for source in range(len(weights))]
        empty = [str(source) for source, members in enumerate(self.members) if not len(members)]
        if empty:
            raise UserError(f"no record is kept of the mixture's source {' and '.join(empty)} (from 0)")
        ends = (torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights) * len(rows)).round().long()
        self.shares = ends.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()

    def draws(self) -> Iterator[Draw]:
        draws = [draw for source in range(len(self.members)) for draw in self._of(source)]
        order = torch.randperm(len(draws), generator=self._generator(-1, self.epoch))[: self.total_size]
        for i in order[self.rank :: self.num_replicas].tolist():
            yield draws[i]

    def _of(self, source: int) -> Iterator[Draw]:
        members, share = self.members[source], self.shares[source]
        start, stop = self.epoch * share, (self.epoch + 1) * share
        for permutation in range(start // len(members), -(-stop // len(members))):
            order = members[torch.randperm(len(members), generator=self._generator(source, permutation))]
            offset = permutation * len(members)
            for record in order[max(0, start - offset) : stop - offset].tolist():
                yield Draw(permutation, record)

    def _generator(self, source: int, number: int) -> torch.Generator:
        seed = hash((self.seed, source, number))  # of integers, the same in every process
        return torch.Generator().manual_seed(seed % 2**63)
