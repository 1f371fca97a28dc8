"""Records to examples and batches: what a model is given, from rows that are at hand or from a stream.

Knows pictures, captions and tensors. Knows nothing of sources, models or training.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_dalle.data.filters.pipeline import Rejection, Screening
from lightning_dalle.data.images.decoding import Pixels, Unreadable, read_pixels
from lightning_dalle.data.images.transforms import Augmentation, middle_square
from lightning_dalle.data.loading.samplers import Draw
from lightning_dalle.data.loading.streaming import Reader, Stream
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer


class Batch(NamedTuple):
    """What every model is given."""

    images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]
    """In [0, 1]. From a loader they come in bytes, a quarter of the way to a device; there the datamodule makes them
    float."""
    text_tokens: Int[Tensor, "b t"]
    """Caption tokens, padded."""
    is_cut: Bool[Tensor, " b"]
    """Whether the caption was longer than text_len."""
    captions: list[str]
    """As they were written, for a model with a tokenizer of its own."""
    ids: list[str]
    """What the records are called by."""
    rejected: dict[str, int] = {}  # noqa: RUF012 (never written to)
    """By reason, how many records were passed over on the way to these; of streamed data."""


class EncodedBatch(NamedTuple):
    """What the transformer is given in the place of a `Batch` where the pictures were encoded beforehand."""

    codes: Int[Tensor, "b g g"]
    text_tokens: Int[Tensor, "b t"]
    """Caption tokens, padded."""
    is_cut: Bool[Tensor, " b"]
    """Whether the caption was longer than text_len."""
    captions: list[str]
    """As they were written."""
    ids: list[str]
    """What the records are called by."""


class Example(NamedTuple):
    """One record of a batch."""

    image: Pixels
    text_tokens: list[int]
    is_cut: bool
    caption: str
    id: str
    rejected: Counter[str] = Counter()  # noqa: RUF012 (never written to)
    """By reason, how many records were passed over on the way to this one; of streamed data."""


@dataclass(frozen=True)
class Preparation:
    """Records to what a model is given; which of several captions it is, the augmentation and the BPE dropout are drawn
    by the record's draw.
    """

    image_size: int
    tokenizer: CaptionTokenizer
    augmentation: Augmentation | None
    bpe_dropout: float
    seed: int

    def __call__(self, record: Mapping[str, Any], draw: Draw) -> Example:
        """An example of a record, whose picture is undecoded.

        Raises:
            Unreadable: if the picture cannot be read.
        """
        picture = read_pixels(record["image"])
        if self.augmentation is not None:
            picture = self.augmentation(picture, self.image_size, draw.picture(self.seed))
        text_tokens, is_cut, caption = self.caption(record["captions"], draw)
        id = record.get("id") or str(draw.record)
        return Example(middle_square(picture, self.image_size), text_tokens, is_cut, caption, id)

    def caption(self, captions: list[str], draw: Draw) -> tuple[list[int], bool, str]:
        """One of a record's captions as tokens, whether it was cut, and as it was written."""
        return draw.caption(captions, self.tokenizer, self.bpe_dropout, self.seed)


def collate(examples: list[Example]) -> Batch:
    """Stacks records."""
    images, text_tokens, is_cut, captions, ids, rejected = zip(*examples, strict=True)
    counts = sum(rejected, Counter[str]())
    return Batch(
        torch.from_numpy(np.stack(images)).movedim(-1, 1),
        torch.tensor(text_tokens),
        torch.tensor(is_cut),
        list(captions),
        list(ids),
        dict(counts),
    )


class CaptionedImages(torch.utils.data.Dataset[Example]):
    """Rows, their pictures undecoded, as examples, each for a draw."""

    def __init__(self, rows: Dataset, prepare: Preparation) -> None:
        self.rows, self.prepare = rows, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> Example:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Example]:
        """A batch's examples: `datasets` takes hardly longer for many rows than for one."""
        columns = self.rows[[draw.record for draw in draws]]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._example(row, draw) for row, draw in zip(rows, draws, strict=True)]

    def _example(self, row: Mapping[str, Any], draw: Draw) -> Example:
        try:
            return self.prepare(row, draw)
        except Unreadable as error:
            raise UserError(f"the picture of record {draw.record} cannot be read: {error}") from error

    collate = staticmethod(collate)


class EncodedCaptions(torch.utils.data.Dataset[tuple[Tensor, list[int], bool, str, str]]):
    """Records as (codes of the epoch's crop, tokens, whether cut, caption, id); captions are drawn as for pictures."""

    def __init__(self, rows: Dataset, prepare: Preparation) -> None:
        self.rows, self.prepare = rows.with_format("arrow"), prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, list[int], bool, str, str]:
        row = self.rows[draw.record]
        crops = row["codes"].combine_chunks().flatten()
        codes = crops[draw.epoch % len(crops)].values.to_numpy().astype(np.int64)
        grid = math.isqrt(len(codes))
        tokens, is_cut, caption = self.prepare.caption(row["captions"][0].as_py(), draw)
        return torch.from_numpy(codes).view(grid, grid), tokens, is_cut, caption, row["id"][0].as_py()

    @staticmethod
    def collate(items: list[tuple[Tensor, list[int], bool, str, str]]) -> EncodedBatch:
        """Stacks records."""
        codes, text_tokens, is_cut, captions, ids = zip(*items, strict=True)
        return EncodedBatch(
            torch.stack(codes), torch.tensor(text_tokens), torch.tensor(is_cut), list(captions), list(ids)
        )


@dataclass(frozen=True)
class Share:
    """A process's part of a stream."""

    rank: int
    world: int
    seed: int
    buffer: int
    """Records of the shuffle buffer."""


class StreamedImages(torch.utils.data.IterableDataset[Example]):
    """Streamed records as examples, screened on the way; the rejected are counted in the next example.

    With `length` it never ends: each iteration goes on where the last one stopped, and so does a resumed one. Without,
    each iteration is every record once, in the order that they are stored in.

    Args:
        parts: a split of each source.
        weights: how often each is drawn.
        prepare: makes examples.
        screening: what is kept.
        share: of this process.
        length: examples of an iteration in all workers of this process, a multiple of their number.
    """

    def __init__(
        self,
        parts: Sequence[IterableDataset],
        weights: Sequence[float],
        prepare: Preparation,
        screening: Screening,
        share: Share,
        length: int | None,
    ) -> None:
        self.parts, self.weights, self.prepare, self.screening = parts, weights, prepare, screening
        self.share, self.length = share, length
        self.state: dict[str, Any] = {}
        self.was_resumed = False

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream that is read once has a length that nobody knows")
        return self.length

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        index, count = self.share.rank * workers + number, self.share.world * workers
        if self.length is None:
            yield from self._once(index, count)
            return
        readers = [Reader(part, index, count, self.share.seed, self.share.buffer) for part in self.parts]
        stream = Stream(readers, self.weights, self.share.seed)
        if self.state:
            stream.load_state_dict(self.state["stream"])
        made, of_epoch = self.state.get("made", 0), self.length // workers
        kept_in = list(self.state.get("kept_in", [-1] * len(readers)))
        was_resumed, self.was_resumed = self.was_resumed, False
        if was_resumed and made % of_epoch == 0:
            return  # it was through with the epoch that others of its process go on with
        for example in self._examples(stream, kept_in):
            made += 1
            self.state = {"stream": stream.state_dict(), "made": made, "kept_in": list(kept_in)}
            yield example
            if made % of_epoch == 0:
                return

    def _once(self, index: int, count: int) -> Iterator[Example]:
        """Held back by one, so that what is rejected after the last is counted too."""
        readers = [Reader(part, index, count, None, 1) for part in self.parts]
        held: Example | None = None
        rejected = Counter[str]()
        for reader in readers:
            for record in reader.one_pass():
                example = self._example(record, Draw(0, record["id"]))
                if isinstance(example, Rejection):
                    rejected[example.reason] += 1
                    continue
                if held is not None:
                    yield held
                held, rejected = example._replace(rejected=rejected), Counter()
        if held is not None:
            yield held._replace(rejected=held.rejected + rejected)

    def _examples(self, stream: Stream, kept_in: list[int]) -> Iterator[Example]:
        """Of each source, `kept_in` is the last pass in which a record was kept."""
        rejected = Counter[str]()
        for source, epoch, record in stream:
            example = self._example(record, Draw(epoch, record["id"]))
            if isinstance(example, Rejection):
                rejected[example.reason] += 1
                if epoch > kept_in[source] + stream.readers[source].patience:
                    counts = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
                    raise UserError(f"the streamed data has no record that is kept: {counts}")
                continue
            kept_in[source] = epoch
            yield example._replace(rejected=rejected)
            rejected = Counter()

    def _example(self, record: Mapping[str, Any], draw: Draw) -> Example | Rejection:
        screened = self.screening.screen(record)
        if isinstance(screened, Rejection):
            return screened
        try:
            return self.prepare(screened, draw)
        except Unreadable as error:
            return Rejection(error.reason)

    collate = staticmethod(collate)

    def state_dict(self) -> dict[str, Any]:
        """Where this process or worker is."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there with the next iteration, which ends the epoch that was left."""
        self.state, self.was_resumed = state, bool(state)
