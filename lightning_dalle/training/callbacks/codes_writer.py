"""Writes the codes of pictures down once, so that the transformer's training need not make them at every step.

Knows the Trainer's hooks and its processes. The shards are those of `data.encoded`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from datasets import Dataset
from jaxtyping import UInt
from pytorch_lightning import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.loading.samplers import Draw
from lightning_dalle.data.sources.encoded import Encoding, Shard, code_type, read_encoding, shards_in, write_shard
from lightning_dalle.errors import UserError
from lightning_dalle.hardware import describe_hardware
from lightning_dalle.provenance import commit
from lightning_dalle.training.lit_dvae import LitDVAE


class CodesWriter(Callback):
    """Makes `predict` with a dVAE write shards of codes, captions and ids, for `EncodedPictures` to read.

    The shards are contiguous blocks of records, whatever the number of processes, which share those that are not there
    yet: an encoding that was interrupted goes on where it was, on as many machines as there are then.

    Args:
        path: folder of the shards, seen by all processes.
        crops: of each split that is encoded, how many times every picture is; in every crop of `train` it is augmented
            anew, as it is in the epochs of a training from pixels. One crop is enough without an augmentation.
        shard_size: pictures in a shard. A shard is what is lost when a process is killed.
    """

    def __init__(self, path: Path, crops: dict[str, int], shard_size: int = 4096) -> None:
        self.path, self.crops, self.shard_size = path, crops, shard_size
        self.shards: list[Shard] = []
        self.codes: list[UInt[np.ndarray, "g g"]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: CaptionedImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.assign(lambda: self._draws(trainer, pl_module))

    def _draws(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, list[Draw]]:
        """What this process is to encode, of each split; asked for when the weights are there."""
        if trainer.ckpt_path is None:
            raise UserError("codes are made by a trained dVAE, but there is none: name its checkpoint as --ckpt_path")
        self.encoding = self._encoding(trainer, pl_module)
        for file in shards_in(self.path):
            self.encoding.check_same(read_encoding(file), file)
        # The first process looks for all: another might see shards that the first has finished by then.
        missing = [shard for shard in self.encoding.shards if not (self.path / shard.name).exists()]
        missing = trainer.strategy.broadcast(missing)
        self.shards = missing[trainer.global_rank :: trainer.world_size]
        self.path.mkdir(parents=True, exist_ok=True)
        rank_zero_info(
            f"{self.path}: {len(missing)} of {len(self.encoding.shards)} shards are to be written, by "
            f"{trainer.world_size} processes"
        )
        return {
            split: [draw for shard in self.shards if shard.split == split for draw in shard.draws(crops)]
            for split, crops in self.crops.items()
        }

    def _encoding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Encoding:
        assert isinstance(pl_module, LitDVAE)
        data: CaptionedImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        config = pl_module.dvae.config
        return Encoding(
            dvae=weights_digest(pl_module.dvae),
            grid=config.grid,
            codebook_size=config.codebook_size,
            image_size=config.image_size,
            augmentation=repr(data.augmentation),
            crops=self.crops,
            records={split: len(_rows(data, split)) for split in self.crops},
            shard_size=self.shard_size,
            source=repr(data.source),
            filters=repr(data.filters or []),
            seed=data.seed,
            attribution=getattr(data.source, "attribution", None),
            made_on={**describe_hardware(), "commit": commit()},
        )

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Codes come in the order in which they were asked for, in batches that know nothing of shards."""
        self.codes += list(outputs.cpu().numpy().astype(code_type(self.encoding.codebook_size)))
        while self.shards and len(self.codes) >= (wanted := self._codes_in(self.shards[0])):
            shard = self.shards.pop(0)
            rows = _rows(trainer.datamodule, shard.split)  # type: ignore[attr-defined]
            write_shard(self.path, shard, self.encoding, rows, np.stack(self.codes[:wanted]))
            del self.codes[:wanted]

    def _codes_in(self, shard: Shard) -> int:
        return len(shard.records) * self.crops[shard.split]


def _rows(data: CaptionedImageDataModule, split: str) -> Dataset:
    rows = data.split(split)
    if not isinstance(rows, Dataset):
        raise UserError(f"shards are blocks of rows, but the split {split} is streamed: encode it without streaming")
    return rows
