"""LightningDataModule that reads captioned images and yields batches of images and text tokens for all models."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets import Image as EncodedImage
from torch.utils.data import DataLoader

from lightning_dalle.checkpoints import read_checkpoint
from lightning_dalle.data.filters.pipeline import FilterPipeline, Rejection
from lightning_dalle.data.filters.rules import Filter
from lightning_dalle.data.images.transforms import Augmentation, to_float
from lightning_dalle.data.loading.examples import (
    Batch,
    CaptionedImageDataset,
    EncodedBatch,
    EncodedDataset,
    ExampleTransform,
    StreamedDataset,
)
from lightning_dalle.data.loading.loader import ResumableLoader
from lightning_dalle.data.loading.samplers import (
    EvalSampler,
    FixedSampler,
    HardNegativeSampler,
    MixtureSampler,
    ResumableSampler,
    SampleIndex,
)
from lightning_dalle.data.loading.streaming import ShardReader
from lightning_dalle.data.sources.encoded import EncodedImages
from lightning_dalle.data.sources.mixture import Mixture
from lightning_dalle.data.sources.source import Source
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer

__all__ = ["Batch", "CaptionedImageDataModule", "Source"]

log = logging.getLogger(__name__)

MAX_STREAMED_CAPTIONS = 50_000
"""Largest number of streamed captions to learn the tokenizer from. Most formats read the images too, which is slow."""


class CaptionedImageDataModule(pl.LightningDataModule):
    """Captioned images for the dVAE, the transformer and CLIP.

    Args:
        source: class that loads the images and captions, such as CaptionedImages.
        image_size: height and width of the images, in pixels.
        batch_size: number of records in a batch, per device.
        text_len: number of tokens to which a caption is truncated or padded (256 in the paper).
        vocab_size: largest number of tokens that the tokenizer learns (16,384 in the paper).
        bpe_dropout: probability of skipping a BPE merge in training (0.1 in the paper).
        num_workers: number of loader processes; 0 loads in the training process.
        seed: seed of the order of records, the choice among captions, the augmentation and the BPE dropout.
        filters: filters of the records of every split. Rows are filtered once before training, streamed records while
            they are read.
        augmentation: augmentation of the training images; without one they are center crops.
        tokenizer_file: JSON file of a tokenizer, or a trained DALL-E, whose tokenizer learns further tokens from the
            training captions, up to `vocab_size`. If not given, it is learned from the training captions, of which
            streamed data uses the first 50,000 in the order of the first epoch.
        epoch_length: number of streamed records in an epoch over all devices, rounded down to whole batches of every
            worker. An epoch begins where the last one stopped, and no record is repeated before all were read.
        shuffle_buffer: number of undecoded streamed records in the shuffle buffer of each worker.
        hard_negative_group_size: number of rows with similar captions that are put side by side, as hard negatives for
            CLIP; 0 shuffles all rows.
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
        hard_negative_group_size: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("text_len", text_len, 1),
            ("num_workers", num_workers, 0),
            ("hard_negative_group_size", hard_negative_group_size, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}, but must be at least {least}")
        self.source, self.filters, self.augmentation = source, filters or [], augmentation
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.text_len, self.vocab_size, self.bpe_dropout = text_len, vocab_size, bpe_dropout
        self.tokenizer_file, self.epoch_length, self.shuffle_buffer = tokenizer_file, epoch_length, shuffle_buffer
        self.hard_negative_group_size = hard_negative_group_size
        self.pipeline = FilterPipeline(self.filters)
        self.splits: DatasetDict | IterableDatasetDict = DatasetDict()
        self.rejected: dict[str, Counter[str]] = {}
        """Number of rejected rows by split and reason. Rejected streamed records are counted in their batches."""
        self._predict_indices: Callable[[], Mapping[str, Sequence[SampleIndex]]] | None = None

    @cached_property
    def tokenizer(self) -> CaptionTokenizer:
        """Tokenizer of a checkpoint or of `tokenizer_file`, or else learned from the training captions on first use."""
        if self.tokenizer_file is None:
            return CaptionTokenizer.train(self._captions(), self.vocab_size, self.text_len)
        if self.tokenizer_file.suffix != ".json":
            known = CaptionTokenizer.from_json(read_checkpoint(self.tokenizer_file, "dalle")["tokenizer"])
            return known.extend(self._captions(), self.vocab_size)
        try:
            found = CaptionTokenizer.from_json(self.tokenizer_file.read_text())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"cannot read a tokenizer from {self.tokenizer_file} ({error!r}); correct data.tokenizer_file"
            ) from error
        if found.vocab_size != self.vocab_size:
            raise UserError(
                f"the tokenizer in {self.tokenizer_file} has vocab_size={found.vocab_size}, but data.vocab_size is "
                f"{self.vocab_size}; set data.vocab_size to {found.vocab_size}"
            )
        return CaptionTokenizer(found.bpe, found.vocab_size, self.text_len)

    def _captions(self) -> Iterator[str]:
        """Return all training captions, or those of the first records if they are streamed."""
        rows = self.split("train")
        lists = rows["captions"] if isinstance(rows, Dataset) else self._streamed_captions()
        return itertools.chain.from_iterable(lists)

    def _streamed_captions(self) -> Iterator[Iterator[str]]:
        """Yield the first captions of each source that pass the filters, in proportion to the weights."""
        streams, weights = self._streams("train")
        for rows, weight in zip(streams, weights, strict=True):
            records = map(self.pipeline.check, ShardReader(rows, 0, 1, self.seed, self.shuffle_buffer).one_pass())
            kept = (record["captions"] for record in records if not isinstance(record, Rejection))
            count = round(MAX_STREAMED_CAPTIONS * weight / sum(weights))
            yield itertools.islice(itertools.chain.from_iterable(kept), count)

    def prepare_data(self) -> None:
        self._load()  # one process fills the cache for the others

    def setup(self, stage: str) -> None:
        if not self.splits:
            self.splits = self._load()
        if stage != "fit":
            return
        train, is_mixture = self.split("train"), isinstance(self.source, Mixture)
        if self.hard_negative_group_size and (isinstance(train, IterableDataset) or is_mixture):
            raise UserError(
                f"data.hard_negative_group_size={self.hard_negative_group_size} needs rows on disk of a single source, "
                f"but data.source is {'a mixture' if is_mixture else 'streamed'}; set hard_negative_group_size to 0"
            )
        _, world_size = self._rank_and_world_size()
        if isinstance(train, Dataset) and len(train) // world_size < self.batch_size:
            raise UserError(
                f"the training split has {len(train)} records, fewer than one batch of batch_size={self.batch_size}"
                + (f" for each of {world_size} processes" if world_size > 1 else "")
                + "; reduce data.batch_size"
            )

    def dataset(
        self, split: str, bpe_dropout: float = 0.0, augmentation: Augmentation | None = None
    ) -> CaptionedImageDataset | EncodedDataset:
        """Return the dataset of examples of a split that has rows on disk."""
        rows = self.split(split)
        dataset = EncodedDataset if "codes" in rows.column_names else CaptionedImageDataset
        return dataset(rows, self._transform(bpe_dropout, augmentation))

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", is_training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the split `test` if the source has one, else of `val`."""
        return self._loader("test" if "test" in self.splits else "val")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the training split, or one loader per split that `set_predict_indices` chose."""
        if self._predict_indices is None:
            return self._loader("train")
        loaders = []
        for split, indices in self._predict_indices().items():
            dataset = self.dataset(split, augmentation=self.augmentation if split == "train" else None)
            loaders.append(self._loader_of(dataset, FixedSampler(indices)))
        return loaders

    def on_after_batch_transfer(self, batch: Batch | EncodedBatch, dataloader_idx: int) -> Batch | EncodedBatch:
        """Convert images to float in [0, 1] on their device; add the tokenizer and the source's attribution."""
        batch = batch._replace(tokenizer=self.tokenizer, attribution=getattr(self.source, "attribution", None))
        if isinstance(batch, EncodedBatch):
            return batch._replace(encoding=self.source)
        return batch._replace(images=to_float(batch.images))

    def set_predict_indices(self, indices: Callable[[], Mapping[str, Sequence[SampleIndex]]]) -> None:
        """Make `predict` read the indices by split that `indices()` returns on this rank when loaders are built."""
        self._predict_indices = indices
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def split(self, name: str) -> Dataset | IterableDataset:
        """Return the records of a split; raise a UserError if the source has no such split."""
        assert self.splits, "call setup() first"
        if name not in self.splits:
            raise UserError(f"this run needs a split {name}, but data.source has only {', '.join(self.splits)}: add it")
        return self.splits[name]

    @property
    def has_image_rows(self) -> bool:
        """Whether all splits are rows on disk with images, neither streamed nor encoded."""
        return all(isinstance(rows, Dataset) and "image" in rows.column_names for rows in self.splits.values())

    def _load(self) -> DatasetDict | IterableDatasetDict:
        if isinstance(self.source, EncodedImages):
            self.source.check_settings(self.augmentation, self.filters, self.seed)
        found = self.source.load(self.image_size)
        if isinstance(found, IterableDatasetDict):
            self.pipeline.require_caption_counts()
            return found
        return DatasetDict({name: self._filtered(name, rows) for name, rows in found.items()})

    def _filtered(self, split: str, rows: Dataset) -> Dataset:
        if "codes" in rows.column_names:
            return rows  # filtered before they were encoded
        rows = rows.cast_column("image", EncodedImage(decode=False))
        kept, rejected, examples = self.pipeline.filter_rows(rows, self.num_workers)
        self.rejected[split] = rejected
        counts = ", ".join(f"{count} {reason} (such as {examples[reason]})" for reason, count in rejected.most_common())
        if not kept:
            raise UserError(
                f"the filters reject all {len(rows)} records of the split {split}: {counts}; loosen data.filters"
            )
        if counts:
            log.warning("split %s: rejected %s, of %d records", split, counts, len(rows))
        return kept

    def _transform(self, bpe_dropout: float = 0.0, augmentation: Augmentation | None = None) -> ExampleTransform:
        return ExampleTransform(self.image_size, self.tokenizer, augmentation, bpe_dropout, self.seed)

    def _loader(self, split: str, is_training: bool = False) -> DataLoader[Any]:
        rows = self.split(split)
        bpe_dropout, augmentation = (self.bpe_dropout, self.augmentation) if is_training else (0.0, None)
        rank, world_size = self._rank_and_world_size()
        overfits = bool(getattr(self.trainer, "overfit_batches", 0))  # every epoch reads the same first records
        options: dict[str, Any] = {"num_replicas": world_size, "rank": rank, "seed": self.seed}
        if isinstance(rows, IterableDataset):
            transform = self._transform(bpe_dropout, augmentation)
            length = self._epoch_length_of_rank(world_size) if is_training and not overfits else None
            streams, weights = self._streams(split)
            options |= {"length": length, "batch_size": self.batch_size, "buffer_size": self.shuffle_buffer}
            stream = StreamedDataset(streams, weights, transform, self.pipeline, **options)
            return self._loader_of(stream, None, drop_last=is_training)
        dataset = self.dataset(split, bpe_dropout, augmentation)
        sampler: ResumableSampler
        if not is_training or overfits:
            sampler = EvalSampler(dataset, shuffle=False, **options)
        elif isinstance(self.source, Mixture):
            sampler = MixtureSampler(rows, self.source.weights, drop_last=True, **options)
        elif self.hard_negative_group_size:
            captions = [captions[0] for captions in rows["captions"]]
            sampler = HardNegativeSampler(captions, self.hard_negative_group_size, drop_last=True, **options)
        else:
            sampler = ResumableSampler(dataset, drop_last=True, **options)
        return self._loader_of(dataset, sampler, drop_last=is_training)

    def _loader_of(
        self,
        dataset: CaptionedImageDataset | EncodedDataset | StreamedDataset,
        sampler: ResumableSampler | None,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        is_cut = isinstance(dataset, StreamedDataset) and (isinstance(limit, int) or limit < 1)
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=dataset.collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            # After an epoch that is cut, new workers begin with the first record that training has not seen.
            persistent_workers=self.num_workers > 0 and not is_cut,
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _epoch_length_of_rank(self, world_size: int) -> int:
        # Every worker yields the same number of batches, so that each epoch begins with the same worker.
        num_workers = max(self.num_workers, 1)
        batches_per_worker = self.epoch_length // (self.batch_size * world_size * num_workers)
        if not batches_per_worker:
            raise UserError(
                f"data.epoch_length is {self.epoch_length}, but batch_size {self.batch_size} for {num_workers} workers "
                f"in {world_size} processes needs at least {self.batch_size * world_size * num_workers}"
            )
        return batches_per_worker * num_workers * self.batch_size

    def _streams(self, split: str) -> tuple[list[IterableDataset], list[float]]:
        """Return the record stream of each source for one split, and the sampling weights of the sources."""
        if isinstance(self.source, Mixture):
            return self.source.streams(split, self.image_size), self.source.weights
        return [self.split(split)], [1.0]

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = CaptionTokenizer.from_json(state_dict["tokenizer"])
        if self.trainer is not None and self.trainer.state.fn != "fit":
            self.tokenizer = saved
            return
        if (saved.vocab_size, saved.text_len) != (self.vocab_size, self.text_len):
            raise UserError(
                f"cannot resume: data.vocab_size is {self.vocab_size} (in the checkpoint {saved.vocab_size}) and "
                f"data.text_len is {self.text_len} (in the checkpoint {saved.text_len}); set both as in the checkpoint"
            )
        if self.tokenizer_file is None:
            self.tokenizer = saved  # the model was trained on these tokens, even if the captions have changed since
        elif self.tokenizer.to_json() != state_dict["tokenizer"]:
            raise UserError(
                f"cannot resume: the checkpoint was trained with another tokenizer than {self.tokenizer_file}; unset "
                "data.tokenizer_file to use the checkpoint's"
            )
