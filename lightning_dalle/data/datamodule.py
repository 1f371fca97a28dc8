"""One LightningDataModule for every model: captioned pictures in, batches of images and text tokens out.

Knows a source's splits and how to draw from them, the same on a resumed run as on an unbroken one. Knows nothing of
models.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.transforms import v2

from lightning_dalle.data.transforms import image_transform
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer


@runtime_checkable
class Source(Protocol):
    """Where captioned pictures come from."""

    def load(self, image_size: int) -> DatasetDict:
        """Splits by name, each with the columns `image` and `captions` (a list): `train` and `val` for a fit, `val` or
        `test` to evaluate on.

        Pictures may be of any size; a source that draws its own may use the wanted one, in pixels.
        """
        ...


class Batch(NamedTuple):
    """What every model is given."""

    images: Float[Tensor, "b 3 h w"]
    """In [0, 1]."""
    text_tokens: Int[Tensor, "b t"]
    """Caption tokens, padded."""
    is_cut: Bool[Tensor, " b"]
    """Whether the caption was longer than text_len."""
    captions: list[str]
    """As they were written, for a model with a tokenizer of its own."""


class Draw(NamedTuple):
    """One use of one record: all randomness of it hangs on these two numbers."""

    epoch: int
    record: int


class Draws(DistributedSampler[Any]):
    """The draws of an epoch: a permutation that depends on seed and epoch alone, split between processes."""

    def __iter__(self) -> Iterator[Draw]:
        for index in super().__iter__():
            yield Draw(self.epoch, index)


class Once(Draws):
    """Every record once, split between processes without the padding that would count some twice."""

    def __iter__(self) -> Iterator[Draw]:
        for index in range(self.rank, len(self.dataset), self.num_replicas):  # type: ignore[arg-type]
            yield Draw(0, index)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class CaptionedImages(torch.utils.data.Dataset[tuple[Tensor, Tensor, bool, str]]):
    """Records as (image, tokens, whether cut, caption); which of several captions it is, and the BPE dropout, are drawn
    by epoch and index.
    """

    def __init__(
        self, rows: Dataset, transform: v2.Transform, tokenizer: CaptionTokenizer, bpe_dropout: float, seed: int
    ) -> None:
        self.rows, self.transform, self.tokenizer = rows, transform, tokenizer
        self.bpe_dropout, self.seed = bpe_dropout, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, bool, str]:
        try:
            row = self.rows[draw.record]
            image = self.transform(row["image"])
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"the picture of record {draw.record} cannot be read: {error}") from error
        rng = random.Random(f"{self.seed} {draw.epoch} {draw.record}")
        caption = rng.choice(row["captions"])
        ids, is_cut = self.tokenizer.pad(self.tokenizer.encode(caption, self.bpe_dropout, rng))
        return image, torch.tensor(ids), is_cut, caption


def collate(items: list[tuple[Tensor, Tensor, bool, str]]) -> Batch:
    """Stacks records."""
    images, text_tokens, is_cut, captions = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(text_tokens), torch.tensor(is_cut), list(captions))


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
        seed: of the order of the records, the choice among captions and the BPE dropout.
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
    ) -> None:
        super().__init__()
        self.source = source
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.text_len, self.vocab_size, self.bpe_dropout = text_len, vocab_size, bpe_dropout
        self.splits: DatasetDict | None = None
        self._tokenizer: CaptionTokenizer | None = None

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Learned from the training captions, alone; a checkpoint that is only evaluated brings its own."""
        if self._tokenizer is None:
            captions = (caption for captions in self._split("train")["captions"] for caption in captions)
            self._tokenizer = CaptionTokenizer.train(captions, self.vocab_size, self.text_len)
        return self._tokenizer

    def prepare_data(self) -> None:
        self.source.load(self.image_size)

    def setup(self, stage: str) -> None:
        if self.splits is None:
            self.splits = self.source.load(self.image_size)
        if stage == "fit" and len(self._split("train")) < self.batch_size:
            raise UserError(
                f"the training split has {len(self._split('train'))} records, less than one batch "
                f"of batch_size={self.batch_size}"
            )

    def dataset(self, split: str, bpe_dropout: float = 0.0) -> CaptionedImages:
        """A split as tensors."""
        return CaptionedImages(
            self._split(split), image_transform(self.image_size), self.tokenizer, bpe_dropout, self.seed
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.dataset("train", self.bpe_dropout), is_training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.dataset("val"), is_training=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The split `test` where the source has one, else `val`."""
        assert self.splits is not None, "setup() comes first"
        return self._loader(self.dataset("test" if "test" in self.splits else "val"), is_training=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.dataset("train"), is_training=False)

    def _split(self, name: str) -> Dataset:
        assert self.splits is not None, "setup() comes first"
        if name not in self.splits:
            raise UserError(f"the data's split {name} is needed, but the source has {', '.join(self.splits)}")
        return self.splits[name]

    def _loader(self, dataset: CaptionedImages, is_training: bool) -> DataLoader[Any]:
        trainer = self.trainer
        sampler = (Draws if is_training else Once)(
            dataset,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            shuffle=is_training,
            seed=self.seed,
            drop_last=is_training,
        )
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=is_training,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn != "fit":
            self._tokenizer = CaptionTokenizer.from_json(state_dict["tokenizer"])
            return
        ours, theirs = self.tokenizer.to_json(), state_dict["tokenizer"]
        if ours != theirs:
            raise UserError(
                f"the checkpoint was trained with another tokenizer ({_digest(theirs)}) than these captions "
                f"give ({_digest(ours)}): its data, text_len or vocab_size differ from this run's"
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
