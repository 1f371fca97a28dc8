"""What TensorBoard shows besides scalars: reconstructions, codebook use and samples.

Knows the Trainer's hooks and its logger. The pictures come from `pictures`, the samples from `inference`.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_dalle.data.datamodule import Batch
from lightning_dalle.inference.options import SamplingOptions
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.pictures import captioned_grid, to_array, to_pil
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE


def batch_size(batch: Batch) -> int:
    """Records in a batch, for Lightning's ThroughputMonitor."""
    return len(batch.images)


def _writer(trainer: pl.Trainer) -> Any:
    """The TensorBoard writer, or None where this process or run has none, or only checks that validation runs."""
    if trainer.sanity_checking or not isinstance(trainer.logger, TensorBoardLogger):
        return None
    return trainer.logger.experiment if trainer.is_global_zero else None


class Reconstructions(Callback):
    """Originals above their reconstructions, and a histogram of the codes in use, after each validation epoch.

    Args:
        num_images: pictures of the first validation batch that are shown.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        writer = _writer(trainer)
        if writer is None or batch_idx > 0:
            return
        assert isinstance(pl_module, LitDVAE)
        images = batch.images[: self.num_images]
        with torch.inference_mode():
            made = pl_module.dvae.decode(pl_module.dvae.encode(images))
        sheet = captioned_grid(
            [[to_pil(image) for image in images], [to_pil(image) for image in made]], ["original", "reconstruction"]
        )
        writer.add_image("val/reconstructions", to_array(sheet), trainer.global_step, dataformats="HWC")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer = _writer(trainer)
        if writer is None:
            return
        assert isinstance(pl_module, LitDVAE)
        counts = pl_module.val_use.counts.cpu()
        codes = torch.arange(len(counts)).repeat_interleave(counts)
        writer.add_histogram("val/codes", codes, trainer.global_step, bins=min(len(counts), 512))
        writer.add_scalar("val/dead_codes", int(pl_module.val_use.dead), trainer.global_step)


class SampleGrid(Callback):
    """Samples of fixed prompts with fixed seeds, their captions drawn on them, after each validation epoch.

    Args:
        prompts: what to draw.
        num_samples: pictures of each prompt.
        options: how codes are drawn.
    """

    def __init__(self, prompts: list[str], num_samples: int = 4, options: SamplingOptions = SamplingOptions()) -> None:  # noqa: B008 (frozen)
        self.prompts, self.num_samples, self.options = prompts, num_samples, options

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """At the first batch, since averaged weights are swapped in before it and out before other hooks may come."""
        writer = _writer(trainer)
        if writer is None or batch_idx > 0:
            return
        assert isinstance(pl_module, LitDALLE)
        assert pl_module.dalle is not None
        assert pl_module.dvae is not None
        pipeline = TextToImage(pl_module.dalle, pl_module.dvae, pl_module.tokenizer)
        made = pipeline.pictures(self.prompts, self.num_samples, options=self.options)
        rows = [[picture.image for picture in pictures] for pictures in made]
        sheet = captioned_grid(rows, self.prompts, columns=2)
        writer.add_image("samples", to_array(sheet), trainer.global_step, dataformats="HWC")
