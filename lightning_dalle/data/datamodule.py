"""One LightningDataModule for every model: captioned pictures in, batches of images and text tokens out.

Knows a source's splits and how to draw from them, the same on a resumed run as on an unbroken one. Knows nothing of
models.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets import Image as EncodedImage
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_dalle.data.filters.pipeline import Rejection, Screening
from lightning_dalle.data.filters.rules import Filter
from lightning_dalle.data.images.transforms import Augmentation, to_float
from lightning_dalle.data.loading.examples import (
    Batch,
    CaptionedImages,
    EncodedBatch,
    EncodedCaptions,
    Preparation,
    Share,
    StreamedImages,
)
from lightning_dalle.data.loading.samplers import Alike, Assigned, Draw, Draws, MixedDraws, Once
from lightning_dalle.data.loading.streaming import Reader, StreamLoader
from lightning_dalle.data.sources.encoded import EncodedPictures
from lightning_dalle.data.sources.mixture import Mixture
from lightning_dalle.data.sources.source import Source
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer

__all__ = ["Batch", "CaptionedImageDataModule", "Source"]

log = logging.getLogger(__name__)

CAPTIONS_TO_LEARN_FROM = 50_000
"""Of streamed data. Their pictures are read with them, since most forms hold them in one file."""


class CaptionedImageDataModule(pl.LightningDataModule):
    """Captioned pictures for the dVAE and the transformer alike.

    Args:
        source: where the pictures come from.
        image_size: height and width of the images, in pixels.
        batch_size: records in a batch, on each device.
        text_len: tokens a caption is cut or padded to (256 in the paper).
        vocab_size: most tokens that the tokenizer learns from the training captions (16,384 in the paper).
        bpe_dropout: probability with which a merge is passed over in training (0.1 in the paper).
        num_workers: processes that load; 0 loads in the training process.
        seed: of the order of the records, the choice among captions, the augmentation and the BPE dropout.
        filters: what records have to pass, in every split. Rows are screened before training, once; streamed records on
            the way.
        augmentation: of the training pictures; their middle squares if there is none.
        tokenizer_file: a tokenizer, as `CaptionTokenizer.to_json` writes it, in the place of one that is learned. From
            streamed data it is learned from the first 50,000 captions, in the order of the first epoch.
        epoch_length: records of an epoch of streamed data, over all devices, rounded down to whole batches of every
            worker. Each pass over the data reads each record once; an epoch begins where the last one stopped.
        shuffle_buffer: streamed records that each worker holds, undecoded, to draw from.
        look_alikes: rows that stand together in an epoch since their captions share their rarest words, for a CLIP to
            tell apart; 0 mixes all.
    """

    def __init__(
        self,
        source: Source,
        image_size: int = 256,
        batch_size: int = 32,
        text_len: int = 256,
        vocab_size: int = 16384,
        bpe_dropout: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        filters: list[Filter] | None = None,
        augmentation: Augmentation | None = None,
        tokenizer_file: Path | None = None,
        epoch_length: int = 100_000,
        shuffle_buffer: int = 1000,
        look_alikes: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("text_len", text_len, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"the data's {name} is {value}, but must be at least {least}")
        self.source, self.filters, self.augmentation = source, filters, augmentation
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.text_len, self.vocab_size, self.bpe_dropout = text_len, vocab_size, bpe_dropout
        self.tokenizer_file, self.epoch_length, self.shuffle_buffer = tokenizer_file, epoch_length, shuffle_buffer
        self.look_alikes = look_alikes
        self.splits: DatasetDict | IterableDatasetDict | None = None
        self.rejected: dict[str, Counter[str]] = {}
        """By split and reason, how many rows were rejected; what is rejected of a stream is told by its batches."""
        self._assigned: Callable[[], Mapping[str, Sequence[Draw]]] | None = None
        self._tokenizer: CaptionTokenizer | None = None

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Learned from the training captions, alone; a checkpoint that is only evaluated brings its own."""
        if self._tokenizer is None:
            if self.tokenizer_file is not None:
                self._tokenizer = self._read_tokenizer(self.tokenizer_file)
            else:
                self._tokenizer = CaptionTokenizer.train(self._captions(), self.vocab_size, self.text_len)
        return self._tokenizer

    def prepare_data(self) -> None:
        self._load()  # in one process, that the others find all of it in the cache

    def setup(self, stage: str) -> None:
        if self.splits is None:
            self.splits = self._load()
        if stage != "fit":
            return
        train = self.split("train")
        if self.look_alikes < 0:
            raise UserError(f"look_alikes is {self.look_alikes}, but must be at least 0, which mixes all")
        if self.look_alikes and (isinstance(train, IterableDataset) or isinstance(self.source, Mixture)):
            raise UserError(
                f"look_alikes={self.look_alikes} needs the captions of all rows of one source, but this one is "
                f"{'a mixture' if isinstance(self.source, Mixture) else 'streamed'}"
            )
        _, world = self._processes()
        if isinstance(train, Dataset) and len(train) // world < self.batch_size:
            raise UserError(
                f"the training split has {len(train)} records, less than one batch of batch_size={self.batch_size}"
                + (f" for each of {world} processes" if world > 1 else "")
            )

    def dataset(self, split: str, bpe_dropout: float = 0.0) -> CaptionedImages | EncodedCaptions:
        """A split as tensors."""
        return _examples(self.split(split), self._preparation(bpe_dropout))

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", is_training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The split `test` where the source has one, else `val`."""
        assert self.splits is not None, "setup() comes first"
        return self._loader("test" if "test" in self.splits else "val")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The training split once, or of each split what was assigned."""
        if self._assigned is None:
            return self._loader("train")
        loaders = []
        for split, draws in self._assigned().items():
            prepare = self._preparation(augmentation=self.augmentation if split == "train" else None)
            loaders.append(self._loader_of(_examples(self.split(split), prepare), Assigned(draws)))
        return loaders

    def on_after_batch_transfer(self, batch: Batch | EncodedBatch, dataloader_idx: int) -> Batch | EncodedBatch:
        """Images in [0, 1], on their device."""
        return batch._replace(images=to_float(batch.images)) if isinstance(batch, Batch) else batch

    def assign(self, draws: Callable[[], Mapping[str, Sequence[Draw]]]) -> None:
        """Makes `predict` read given draws of each split in this process, asked for when the loaders are made."""
        self._assigned = draws
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def split(self, name: str) -> Dataset | IterableDataset:
        """The records of a split.

        Raises:
            UserError: if the source has no such split.
        """
        assert self.splits is not None, "setup() comes first"
        if name not in self.splits:
            raise UserError(f"the data's split {name} is needed, but the source has {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def has_pictures_at_hand(self) -> bool:
        """Whether the splits are rows with pictures, rather than streamed or codes."""
        assert self.splits is not None, "setup() comes first"
        return all(isinstance(rows, Dataset) and "image" in rows.column_names for rows in self.splits.values())

    def _load(self) -> DatasetDict | IterableDatasetDict:
        """The source's splits; rows are screened."""
        if isinstance(self.source, EncodedPictures):
            self.source.check_made_with(self.augmentation, self.filters or (), self.seed)
        found = self.source.load(self.image_size)
        if isinstance(found, IterableDatasetDict):
            Screening(self.filters or ()).check_stream()
            return found
        return DatasetDict({name: self._screened(name, rows) for name, rows in found.items()})

    def _screened(self, split: str, rows: Dataset) -> Dataset:
        if "codes" in rows.column_names:
            return rows  # screened as pictures, by the same filters
        rows = rows.cast_column("image", EncodedImage(decode=False))
        kept, rejected, examples = Screening(self.filters or ()).screen_rows(rows, self.num_workers)
        self.rejected[split] = rejected
        counts = ", ".join(f"{count} {reason} (such as {examples[reason]})" for reason, count in rejected.most_common())
        if not kept:
            raise UserError(f"the split {split} has no record that is kept of its {len(rows)}: {counts}")
        if counts:
            log.warning("split %s: passed over %s, of %d records", split, counts, len(rows))
        return kept

    def _preparation(self, bpe_dropout: float = 0.0, augmentation: Augmentation | None = None) -> Preparation:
        return Preparation(self.image_size, self.tokenizer, augmentation, bpe_dropout, self.seed)

    def _loader(self, split: str, is_training: bool = False) -> DataLoader[Any]:
        rows = self.split(split)
        prepare = self._preparation(self.bpe_dropout, self.augmentation) if is_training else self._preparation()
        rank, world = self._processes()
        dataset: CaptionedImages | EncodedCaptions | StreamedImages
        sampler: Draws | None = None
        if isinstance(rows, IterableDataset):
            share = Share(rank, world, self.seed, self.shuffle_buffer)
            length = self._batches(world) * self.batch_size if is_training else None
            dataset = StreamedImages(*self._parts(split), prepare, Screening(self.filters or ()), share, length)
        else:
            dataset = _examples(rows, prepare)
            options: dict[str, Any] = {"num_replicas": world, "rank": rank, "seed": self.seed}
            if not is_training:
                sampler = Once(dataset, shuffle=False, **options)
            elif isinstance(self.source, Mixture):
                sampler = MixedDraws(rows, self.source.weights, drop_last=True, **options)
            elif self.look_alikes:
                captions = [captions[0] for captions in rows["captions"]]
                sampler = Alike(captions, self.look_alikes, drop_last=True, **options)
            else:
                sampler = Draws(dataset, drop_last=True, **options)
        return self._loader_of(dataset, sampler, drop_last=is_training)

    def _loader_of(
        self,
        dataset: CaptionedImages | EncodedCaptions | StreamedImages,
        sampler: Draws | None,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        loader = StreamLoader if isinstance(dataset, StreamedImages) else StatefulDataLoader
        return loader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=dataset.collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def _processes(self) -> tuple[int, int]:
        """The number of this one, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches(self, world: int) -> int:
        """Of an epoch of streamed data, in each process: the same number of every worker, so that each epoch begins
        with the same one.
        """
        workers = max(self.num_workers, 1)
        batches = self.epoch_length // (self.batch_size * world * workers)
        if not batches:
            raise UserError(
                f"epoch_length={self.epoch_length} is less than one batch of batch_size={self.batch_size} for each of "
                f"{workers} workers in {world} processes"
            )
        return batches * workers

    def _parts(self, split: str) -> tuple[list[IterableDataset], list[float]]:
        """A streamed split of every source, and their weights."""
        if isinstance(self.source, Mixture):
            return self.source.parts(split, self.image_size), self.source.weights
        return [self.split(split)], [1.0]

    def _captions(self) -> Iterator[str]:
        """That a tokenizer is learned from."""
        rows = self.split("train")
        if isinstance(rows, Dataset):
            return itertools.chain.from_iterable(rows["captions"])
        parts, weights = self._parts("train")
        shares = [round(CAPTIONS_TO_LEARN_FROM * weight / sum(weights)) for weight in weights]
        pairs = zip(parts, shares, strict=True)
        return itertools.chain.from_iterable(itertools.islice(self._read_captions(part), n) for part, n in pairs)

    def _read_captions(self, part: IterableDataset) -> Iterator[str]:
        screening = Screening(self.filters or ())
        for record in Reader(part, 0, 1, self.seed, self.shuffle_buffer).one_pass():
            screened = screening.screen(record)
            if not isinstance(screened, Rejection):
                yield from screened["captions"]

    def _read_tokenizer(self, path: Path) -> CaptionTokenizer:
        try:
            found = CaptionTokenizer.from_json(path.read_text())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} holds no tokenizer: {error}") from error
        if found.vocab_size != self.vocab_size:
            raise UserError(
                f"the tokenizer in {path} has vocab_size={found.vocab_size}, but the data {self.vocab_size}"
            )
        return CaptionTokenizer(found.bpe, found.vocab_size, self.text_len)

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        theirs = state_dict["tokenizer"]
        found = CaptionTokenizer.from_json(theirs)
        if self.trainer is not None and self.trainer.state.fn != "fit":
            self._tokenizer = found
            return
        theirs_is = {"vocab_size": found.vocab_size, "text_len": found.text_len}
        ours_is = {"vocab_size": self.vocab_size, "text_len": self.text_len}
        if theirs_is != ours_is:
            raise UserError(f"the checkpoint's captions have {_named(theirs_is)}, but this run's {_named(ours_is)}")
        if self.tokenizer_file is None:
            self._tokenizer = found  # what the model has learned to read, even if there are other captions by now
        elif self.tokenizer.to_json() != theirs:
            raise UserError(f"the checkpoint was trained with another tokenizer than that of {self.tokenizer_file}")


def _named(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _examples(rows: Dataset, prepare: Preparation) -> CaptionedImages | EncodedCaptions:
    return (EncodedCaptions if "codes" in rows.column_names else CaptionedImages)(rows, prepare)
