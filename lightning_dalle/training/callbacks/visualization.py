"""Callbacks that show images, histograms and curves in TensorBoard."""

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
from lightning_dalle.errors import UserError
from lightning_dalle.images import captioned_grid, to_array, to_pil
from lightning_dalle.inference.config import GenerationConfig, SamplingConfig
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.callbacks.requirements import require_model
from lightning_dalle.training.distributed.sharding import require_unsharded
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.precision.gradient_scales import PaperPrecision


def batch_size(batch: Batch | EncodedBatch) -> int:
    """Return the number of records in a batch."""
    return len(batch.text_tokens)


def _writer(trainer: pl.Trainer) -> Any:
    """Return the TensorBoard writer, or None in sanity checks, without a TensorBoardLogger, and on ranks above 0."""
    if trainer.sanity_checking or not isinstance(trainer.logger, TensorBoardLogger):
        return None
    return trainer.logger.experiment if trainer.is_global_zero else None


class DataSummary(Callback):
    """Training data as the model reads it: first batch, caption lengths, and rejected records by reason.

    The grid of the first batch shows each image (decoded from its codes, if the dataset is encoded) below its tokens as
    text. A histogram of caption lengths in tokens is written after each epoch. Records are rejected before the first
    step, or, if streamed, during training; a resumed run counts the streamed ones from 0.

    Args:
        num_images: number of images of the first batch in the grid.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images
        self.rejected = Counter[str]()
        """Number of streamed records that this process rejected, by reason."""
        self.lengths: Tensor | None = None
        """Number of captions of each length (0 to text_len tokens) that this process has read in this epoch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_rejected(trainer, trainer.datamodule.rejected.get("train", {}))  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch | EncodedBatch, batch_idx: int
    ) -> None:
        tokenizer: CaptionTokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        writer = _writer(trainer)
        if writer is not None and self.lengths is None:
            images = [[to_pil(image)] for image in self._images(batch, pl_module)]
            captions = [tokenizer.decode(ids) for ids in batch.text_tokens[: self.num_images].tolist()]
            grid = captioned_grid(images, captions, columns=4, side=160)
            writer.add_image("data/batch", to_array(grid), trainer.global_step, dataformats="HWC")
        if self.lengths is None:
            self.lengths = torch.zeros(tokenizer.text_len + 1, dtype=torch.long, device=batch.text_tokens.device)
        lengths = (batch.text_tokens < tokenizer.vocab_size).sum(1)
        # Comparison instead of bincount, which synchronizes with the GPU.
        self.lengths += (lengths[:, None] == torch.arange(len(self.lengths), device=lengths.device)).sum(0)
        if isinstance(batch, Batch):
            self.rejected.update(batch.rejected)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning sums epoch metrics over processes at their first access. A progress bar accesses them only on rank
        # 0, which would deadlock with the gather below. All ranks therefore access them here first.
        _ = trainer.callback_metrics
        gathered: list[Any] = [self.rejected] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, self.rejected)
        self._write_rejected(trainer, sum(gathered, Counter[str]()))
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
        with torch.inference_mode():
            return pl_module.dvae.decode(batch.codes[: self.num_images])

    def _write_rejected(self, trainer: pl.Trainer, rejected: Mapping[str, int]) -> None:
        writer = _writer(trainer)
        for reason, count in rejected.items() if writer is not None else ():
            writer.add_scalar(f"data/rejected/{reason}", count, trainer.global_step)


class Reconstructions(Callback):
    """Grid of originals above their reconstructions, and a histogram of the used codes, at each validation.

    Args:
        num_images: number of images of the first validation batch that are shown.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_model(self, pl_module, LitDVAE)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        writer = _writer(trainer)
        if writer is None or batch_idx > 0:
            return
        assert isinstance(pl_module, LitDVAE)
        images = batch.images[: self.num_images]
        with torch.inference_mode():
            reconstructed = pl_module.dvae.decode(pl_module.dvae.encode(images))
        rows = [[to_pil(image) for image in row] for row in (images, reconstructed)]
        grid = captioned_grid(rows, ["original", "reconstruction"])
        writer.add_image("val/reconstructions", to_array(grid), trainer.global_step, dataformats="HWC")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer = _writer(trainer)
        if writer is None:
            return
        assert isinstance(pl_module, LitDVAE)
        counts = pl_module.val_perplexity.counts.cpu()
        codes = torch.arange(len(counts)).repeat_interleave(counts)
        writer.add_histogram("val/codes", codes, trainer.global_step, bins=min(len(counts), 512))
        writer.add_scalar("val/dead_codes", int(pl_module.val_perplexity.num_unused), trainer.global_step)


class SampleGrid(Callback):
    """Grid of images sampled for fixed prompts with fixed seeds, at each validation.

    Args:
        prompts: prompts to sample.
        num_samples: number of samples per prompt.
        sampling: sampling settings, such as temperature and top-k.
    """

    def __init__(
        self,
        prompts: list[str],
        num_samples: int = 4,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.prompts, self.num_samples, self.sampling = prompts, num_samples, sampling

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_model(self, pl_module, LitDALLE)
        require_unsharded(trainer, "SampleGrid")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the grid before the first batch; only then has EMAWeightAveraging swapped in its averaged weights."""
        writer = _writer(trainer)
        if writer is None or batch_idx > 0:
            return
        assert isinstance(pl_module, LitDALLE)
        pipeline = TextToImage(pl_module.dalle, pl_module.dvae, pl_module.tokenizer)
        config = GenerationConfig(num_candidates=self.num_samples, sampling=self.sampling)
        rows = [[sample.image for sample in samples] for samples in pipeline.generate(self.prompts, config)]
        grid = captioned_grid(rows, self.prompts, columns=2)
        writer.add_image("samples", to_array(grid), trainer.global_step, dataformats="HWC")


class GradientScaleCurves(Callback):
    """Curves of all resblocks' gradient scales over this fit, as in the paper's Fig. 12, at each validation.

    Also logs the fraction of updates skipped because a gradient was NaN or infinite.
    """

    def __init__(self) -> None:
        self.curves: dict[int, list[float]] = {}
        """Base-2 logarithms of the gradient scales of all resblocks, by optimizer step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.precision_plugin, PaperPrecision):
            raise UserError(
                "GradientScaleCurves shows the gradient scales of PaperPrecision, which this run does not use: remove "
                "GradientScaleCurves from trainer.callbacks, or set trainer.plugins to PaperPrecision"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:
            return
        assert isinstance(trainer.precision_plugin, PaperPrecision)
        scales = trainer.precision_plugin.scales
        self.curves[trainer.global_step] = scales.log2.tolist()
        pl_module.log("train/skipped_updates", scales.num_skipped / scales.num_updates)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer = _writer(trainer)
        if writer is not None and self.curves:
            writer.add_figure("gradient_scales", plots.plot_gradient_scales(self.curves), trainer.global_step)
