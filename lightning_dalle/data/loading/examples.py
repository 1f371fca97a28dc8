"""PyTorch datasets that turn records into examples of image and tokens, and functions that collate batches."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_dalle.data.filters.pipeline import FilterPipeline, Rejection
from lightning_dalle.data.images.decoding import Pixels, UnreadableImage, decode_image
from lightning_dalle.data.images.transforms import Augmentation, center_crop
from lightning_dalle.data.loading.samplers import SampleIndex
from lightning_dalle.data.loading.streaming import MixedStream, ShardReader
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer


class Batch(NamedTuple):
    """Batch of images and captions, the input of every model."""

    images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]
    """Images as float in [0, 1]. A loader yields uint8, which the datamodule converts on the device."""
    text_tokens: Int[Tensor, "b t"]
    """Padded token ids of the captions."""
    is_truncated: Bool[Tensor, " b"]
    """Whether each caption had more than text_len tokens."""
    captions: list[str]
    """Texts of the captions, for a model with its own tokenizer."""
    ids: list[str]
    """Ids of the records."""
    rejected: dict[str, int] = {}  # noqa: RUF012 (never written to)
    """Number of streamed records rejected since the previous batch, by reason."""
    tokenizer: CaptionTokenizer | None = None
    """Tokenizer of the captions, which the datamodule adds."""
    attribution: str | None = None
    """Credit line that the licence of the images requires on generated images, which the datamodule adds."""


class EncodedBatch(NamedTuple):
    """Batch with codes in place of images: the input of the transformer when images were encoded before training."""

    codes: Int[Tensor, "b g g"]
    text_tokens: Int[Tensor, "b t"]
    is_truncated: Bool[Tensor, " b"]
    captions: list[str]
    ids: list[str]
    tokenizer: CaptionTokenizer | None = None
    attribution: str | None = None
    encoding: Any = None
    """Source of the codes, an `EncodedImages`, which the datamodule adds."""


class Example(NamedTuple):
    """Image and tokenized caption of one record: one element of a `Batch`."""

    image: Pixels
    text_tokens: list[int]
    is_truncated: bool
    caption: str
    id: str
    rejected: Counter[str] = Counter()  # noqa: RUF012 (never written to)
    """Number of streamed records rejected since the previous example, by reason."""


StreamedExample = tuple[Example, int, dict[str, Any] | None]
"""Example, its worker, and the state from which that worker continues, or None if every record is read once."""

EncodedExample = tuple[Tensor, list[int], bool, str, str]
"""One element of an `EncodedBatch`: codes, token ids, whether they were truncated, caption, id."""


@dataclass(frozen=True)
class ExampleTransform:
    """Transform of records into examples; `seed` and the sample index seed all its random choices."""

    image_size: int
    tokenizer: CaptionTokenizer
    augmentation: Augmentation | None
    bpe_dropout: float
    seed: int

    def __call__(self, record: Mapping[str, Any], index: SampleIndex) -> Example:
        """Return the example of a record; raise an UnreadableImage if its image cannot be decoded."""
        image = decode_image(record["image"])
        if self.augmentation is not None:
            image = self.augmentation(image, self.image_size, index.image_rng(self.seed))
        id = record.get("id") or str(index.record)
        return Example(center_crop(image, self.image_size), *self.tokenize(record["captions"], index), id)

    def tokenize(self, captions: list[str], index: SampleIndex) -> tuple[list[int], bool, str]:
        """Choose one of a record's captions; return its padded tokens, whether they were truncated, and its text."""
        rng = index.caption_rng(self.seed)
        caption = rng.choice(captions)
        return *self.tokenizer.pad(self.tokenizer.encode(caption, self.bpe_dropout, rng)), caption


def collate(examples: list[Example]) -> Batch:
    """Collate examples into a batch."""
    images, text_tokens, is_truncated, captions, ids, rejected = zip(*examples, strict=True)
    return Batch(
        torch.from_numpy(np.stack(images)).movedim(-1, 1),
        torch.tensor(text_tokens),
        torch.tensor(is_truncated),
        list(captions),
        list(ids),
        dict(sum(rejected, Counter[str]())),
    )


class CaptionedImageDataset(torch.utils.data.Dataset[Example]):
    """Dataset of rows with undecoded images, which returns the example of a `SampleIndex` or of a row number."""

    collate = staticmethod(collate)

    def __init__(self, rows: Dataset, transform: ExampleTransform) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: SampleIndex | int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SampleIndex | int]) -> list[Example]:
        # `datasets` takes little longer for many rows than for one.
        samples = [SampleIndex.of(index) for index in indices]
        rows = self.rows.__getitems__([sample.record for sample in samples])
        return [self._example(row, sample) for row, sample in zip(rows, samples, strict=True)]

    def _example(self, row: Mapping[str, Any], index: SampleIndex) -> Example:
        try:
            return self.transform(row, index)
        except UnreadableImage as error:
            raise UserError(f"cannot decode the image of record {index.record}: {error}; remove the record") from error


class EncodedDataset(torch.utils.data.Dataset[EncodedExample]):
    """Dataset of rows with codes of several crops of an image; epoch e reads crop e modulo their number."""

    def __init__(self, rows: Dataset, transform: ExampleTransform) -> None:
        self.rows, self.transform = rows.with_format("arrow"), transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: SampleIndex | int) -> EncodedExample:
        index = SampleIndex.of(index)
        row = self.rows[index.record]
        crops = row["codes"].combine_chunks().flatten()
        codes = crops[index.epoch % len(crops)].values.to_numpy().astype(np.int64)
        grid = math.isqrt(len(codes))
        caption = self.transform.tokenize(row["captions"][0].as_py(), index)
        return torch.from_numpy(codes).view(grid, grid), *caption, row["id"][0].as_py()

    @staticmethod
    def collate(examples: list[EncodedExample]) -> EncodedBatch:
        """Collate examples into a batch."""
        codes, text_tokens, is_truncated, captions, ids = zip(*examples, strict=True)
        return EncodedBatch(
            torch.stack(codes), torch.tensor(text_tokens), torch.tensor(is_truncated), list(captions), list(ids)
        )


@dataclass(eq=False)
class StreamedDataset(torch.utils.data.IterableDataset[StreamedExample]):
    """Iterable dataset of examples from streamed records; each example counts the rejected records before it.

    One iteration yields `length` examples over all workers of this rank, so `length` must be a multiple of their
    number. The next iteration, or a resumed run, continues where it stopped. If `length` is None, an iteration yields
    every record once, in the stored order.
    """

    streams: Sequence[IterableDataset]
    """Record streams to mix, one per source, all of the same split."""
    weights: Sequence[float]
    """Sampling weight of each source."""
    transform: ExampleTransform
    filters: FilterPipeline
    length: int | None
    batch_size: int
    buffer_size: int
    rank: int
    num_replicas: int
    seed: int
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """State of each worker that has read a record."""
    epoch: int = 0
    num_read: int = 0
    """Number of examples that an interrupted run read of the epoch that the next iteration finishes."""

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of records in a stream is unknown")
        return self.length

    def __iter__(self) -> Iterator[StreamedExample]:
        info = get_worker_info()
        num_workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader, num_readers = self.rank * num_workers + worker, self.num_replicas * num_workers
        if self.length is None:
            for example in self._one_pass([ShardReader(rows, reader, num_readers, None, 1) for rows in self.streams]):
                yield example, worker, None
            return
        readers = [ShardReader(rows, reader, num_readers, self.seed, self.buffer_size) for rows in self.streams]
        stream = MixedStream(readers, self.weights, self.seed)
        last_kept = [-1] * len(readers)
        if state := self.states.get(worker):
            stream.load_state_dict(state["stream"])
            last_kept = list(state["last_kept"])
        num_done = len(range(worker, self.num_read // self.batch_size, num_workers)) * self.batch_size
        num_left = self.length // num_workers - num_done
        self.num_read = 0  # a persistent worker begins the next epoch with this object
        for example in itertools.islice(self._endless(stream, last_kept), num_left):
            self.states[worker] = state = {"stream": stream.state_dict(), "last_kept": list(last_kept)}
            yield example, worker, state

    @staticmethod
    def collate(examples: list[StreamedExample]) -> tuple[Batch, int, dict[str, Any] | None]:
        """Collate examples into a batch, with its worker and the state after its last example."""
        batch, workers, states = zip(*examples, strict=True)
        return collate(list(batch)), workers[-1], states[-1]

    def _one_pass(self, readers: Sequence[ShardReader]) -> Iterator[Example]:
        """Yield every example once. The last one also counts the records that were rejected after it."""
        pending: Example | None = None
        rejected = Counter[str]()
        for record in itertools.chain.from_iterable(reader.one_pass() for reader in readers):
            example = self._example(record, epoch=0)
            if isinstance(example, Rejection):
                rejected[example.reason] += 1
                continue
            if pending is not None:
                yield pending
            pending, rejected = example._replace(rejected=rejected), Counter()
        if pending is not None:
            yield pending._replace(rejected=pending.rejected + rejected)

    def _endless(self, stream: MixedStream, last_kept: list[int]) -> Iterator[Example]:
        """Yield examples without end, and set `last_kept` to the number of each source's last pass that gave one."""
        rejected = Counter[str]()
        for source, epoch, record in stream:
            example = self._example(record, epoch)
            if isinstance(example, Rejection):
                rejected[example.reason] += 1
                if epoch > last_kept[source] + stream.readers[source].max_empty_passes:
                    counts = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
                    raise UserError(f"all records of the streamed data were rejected: {counts}; loosen data.filters")
                continue
            last_kept[source] = epoch
            yield example._replace(rejected=rejected)
            rejected = Counter()

    def _example(self, record: Mapping[str, Any], epoch: int) -> Example | Rejection:
        checked = self.filters.check(record)
        if isinstance(checked, Rejection):
            return checked
        try:
            return self.transform(checked, SampleIndex(epoch, record["id"]))
        except UnreadableImage as error:
            return Rejection(error.reason)
