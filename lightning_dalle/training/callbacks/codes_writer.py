"""Callback that writes a dVAE's codes to disk, so that training the transformer need not encode images."""

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
from lightning_dalle.data.loading.samplers import SampleIndex
from lightning_dalle.data.sources.encoded import Encoding, Shard, code_type, list_shards, read_encoding, write_shard
from lightning_dalle.errors import UserError
from lightning_dalle.hardware import describe_hardware
from lightning_dalle.provenance import commit
from lightning_dalle.training.callbacks.requirements import require_data, require_model
from lightning_dalle.training.lit_dvae import LitDVAE


class CodesWriter(Callback):
    """Writer of shards of codes, captions and ids, which the data source `EncodedImages` reads, during `predict`.

    Shards are contiguous blocks of records, independent of the number of processes. The processes divide the missing
    shards among themselves, so an interrupted encoding resumes on any number of machines.

    Args:
        path: folder of the shards, shared by all processes.
        crops: number of encoded crops per image, by split. Crops of `train` are randomly augmented; 1 suffices without.
        shard_size: number of images in a shard. A killed process loses at most its current shard.
    """

    def __init__(self, path: Path, crops: dict[str, int], shard_size: int = 4096) -> None:
        self.path, self.crops, self.shard_size = path, crops, shard_size
        self.shards: list[Shard] = []
        self.codes: list[UInt[np.ndarray, "g g"]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_model(self, pl_module, LitDVAE)
        data = require_data(self, trainer)
        data.set_predict_indices(lambda: self._indices(trainer, pl_module))

    def _indices(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, list[SampleIndex]]:
        """Return, by split, the indices of the samples in the missing shards that this process must encode.

        Call it after the checkpoint is loaded, because the weights' hash decides whether existing shards are valid.
        """
        if trainer.ckpt_path is None:
            raise UserError("predict needs the checkpoint of a trained dVAE to encode images; set --ckpt_path to it")
        self.encoding = self._encoding(trainer, pl_module)
        for file in list_shards(self.path):
            self.encoding.check_equal(read_encoding(file), file)
        # Rank 0 lists the missing shards for all ranks, because it may finish a shard before another rank looks.
        missing = [shard for shard in self.encoding.shards if not (self.path / shard.name).exists()]
        missing = trainer.strategy.broadcast(missing)
        self.shards = missing[trainer.global_rank :: trainer.world_size]
        self.path.mkdir(parents=True, exist_ok=True)
        rank_zero_info(
            f"{self.path}: writing {len(missing)} of {len(self.encoding.shards)} shards with {trainer.world_size} "
            "processes"
        )
        return {
            split: [index for shard in self.shards if shard.split == split for index in shard.sample_indices(crops)]
            for split, crops in self.crops.items()
        }

    def _encoding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Encoding:
        assert isinstance(pl_module, LitDVAE)
        data, config = require_data(self, trainer), pl_module.dvae.config
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
            filters=repr(data.filters),
            seed=data.seed,
            attribution=getattr(data.source, "attribution", None),
            made_on={**describe_hardware(), "commit": commit()},
        )

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Write every shard whose codes are complete; a batch can span several shards."""
        self.codes += list(outputs.cpu().numpy().astype(code_type(self.encoding.codebook_size)))
        while self.shards:
            shard = self.shards[0]
            size = len(shard.records) * self.crops[shard.split]
            if len(self.codes) < size:
                break
            rows = _rows(require_data(self, trainer), shard.split)
            write_shard(self.path, shard, self.encoding, rows, np.stack(self.codes[:size]))
            del self.shards[0], self.codes[:size]


def _rows(data: CaptionedImageDataModule, split: str) -> Dataset:
    rows = data.split(split)
    if not isinstance(rows, Dataset):
        raise UserError(
            f"CodesWriter cannot divide the streamed split {split} into shards; set data.source.streaming to false"
        )
    return rows
