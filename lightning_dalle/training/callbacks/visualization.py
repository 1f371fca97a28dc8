"""What TensorBoard shows besides scalars: the data, reconstructions, codebook use, samples and gradient scales.

Knows the Trainer's hooks and its logger. The pictures come from `pictures`, the samples from `inference`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from lightning_dalle import plots
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.data.loading.examples import EncodedBatch
from lightning_dalle.images import captioned_grid, to_array, to_pil
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.distributed.sharding import needs_the_whole_model
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.precision.gradient_scales import PaperPrecision


def batch_size(batch: Batch | EncodedBatch) -> int:
    """Records in a batch, for Lightning's ThroughputMonitor."""
    return len(batch.text_tokens)


def _writer(trainer: pl.Trainer) -> Any:
    """The TensorBoard writer, or None where this process or run has none, or only checks that validation runs."""
    if trainer.sanity_checking or not isinstance(trainer.logger, TensorBoardLogger):
        return None
    return trainer.logger.experiment if trainer.is_global_zero else None


class TrainingData(Callback):
    """The data as the model sees it: a grid of the first batch, each picture (of codes, what they decode to) below its
    tokens as text; after each epoch a histogram of the captions' lengths in tokens; and the number of rejected records
    by reason.

    Rows are rejected before the first step; streamed records on the way, counted since this fit began.

    Args:
        num_images: pictures of the first batch that are shown.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images
        self.rejected = Counter[str]()
        """Of this process, from streamed data."""
        self.lengths: Tensor | None = None
        """How many captions of this epoch and process have each number of tokens, 0 to text_len."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._write_rejected(trainer, datamodule.rejected.get("train", {}))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch | EncodedBatch, batch_idx: int
    ) -> None:
        tokenizer: CaptionTokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        writer = _writer(trainer)
        if writer is not None and self.lengths is None:
            pictures = [[to_pil(image)] for image in self._images(batch, pl_module)]
            captions = [tokenizer.decode(ids) for ids in batch.text_tokens[: self.num_images].tolist()]
            sheet = captioned_grid(pictures, captions, columns=4, side=160)
            writer.add_image("data/batch", to_array(sheet), trainer.global_step, dataformats="HWC")
        if self.lengths is None:
            self.lengths = torch.zeros(tokenizer.text_len + 1, dtype=torch.long, device=batch.text_tokens.device)
        lengths = (batch.text_tokens < tokenizer.vocab_size).sum(1)
        # By comparison, not by bincount, which would wait for a GPU.
        self.lengths += (lengths[:, None] == torch.arange(len(self.lengths), device=lengths.device)).sum(0)
        if isinstance(batch, Batch):
            self.rejected.update(batch.rejected)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What is logged of the epoch is summed over the processes when it is first asked for: by a progress bar, of
        # the first process alone. So all ask here, lest the others wait below while that one waits for their sums.
        _ = trainer.callback_metrics
        everywhere: list[Any] = [self.rejected] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(everywhere, self.rejected)
        self._write_rejected(trainer, sum(everywhere, Counter[str]()))
        writer = _writer(trainer)
        if writer is not None and self.lengths is not None:
            counts = self.lengths.cpu()
            lengths = torch.arange(len(counts)).repeat_interleave(counts)
            writer.add_histogram("data/caption_tokens", lengths, trainer.global_step, bins=min(len(counts), 512))
            self.lengths.zero_()

    def _images(self, batch: Batch | EncodedBatch, pl_module: pl.LightningModule) -> Float[Tensor, "n 3 h w"]:
        if isinstance(batch, Batch):
            return batch.images[: self.num_images]
        assert isinstance(pl_module, LitDALLE)
        assert pl_module.dvae is not None
        with torch.inference_mode():
            return pl_module.dvae.decode(batch.codes[: self.num_images])

    def _write_rejected(self, trainer: pl.Trainer, rejected: Mapping[str, int]) -> None:
        writer = _writer(trainer)
        for reason, count in rejected.items() if writer is not None else ():
            writer.add_scalar(f"data/rejected/{reason}", count, trainer.global_step)


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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        needs_the_whole_model(trainer, "SampleGrid")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch | EncodedBatch,
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


class GradientScaleCurves(Callback):
    """The gradient scales of all resblocks over this fit's updates, as in the paper's Fig. 12, after each validation
    epoch; and the share of the run's updates that were skipped.
    """

    def __init__(self) -> None:
        self.curves: dict[int, list[float]] = {}
        """By update, the base-2 logarithms of the scales in the order of the resblocks."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.log_every_n_steps or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        assert isinstance(trainer.precision_plugin, PaperPrecision)
        scales = trainer.precision_plugin.scales
        self.curves[trainer.global_step] = scales.log2.tolist()
        pl_module.log("train/skipped_updates", scales.skipped / scales.updates)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer = _writer(trainer)
        if writer is not None and self.curves:
            writer.add_figure("gradient_scales", plots.gradient_scales(self.curves), trainer.global_step)
