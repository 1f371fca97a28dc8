"""Callbacks that log images, histograms and curves of the data and the models."""

from collections import Counter
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning import Callback
from torch import Tensor

from lightning_dalle import plots
from lightning_dalle.data.images.transforms import to_float
from lightning_dalle.data.loading.examples import Batch, EncodedBatch
from lightning_dalle.errors import UserError
from lightning_dalle.images import captioned_grid, to_pil
from lightning_dalle.inference.config import GenerationConfig, SamplingConfig
from lightning_dalle.training.callbacks.loggers import log_histogram, log_image, log_scalars, shows_images
from lightning_dalle.training.callbacks.requirements import require_model
from lightning_dalle.training.distributed.sharding import require_unsharded
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.precision.gradient_scales import PaperPrecision

NUM_IMAGES = 16
"""Number of images of a batch that a grid shows."""


def batch_size(batch: Batch | EncodedBatch) -> int:
    """Return the number of records in a batch."""
    return len(batch.text_tokens)


class DataSummary(Callback):
    """Training data as the model reads it: first batch, caption lengths, and rejected records by reason.

    The grid of the first batch shows each image (decoded from its codes, if the dataset is encoded) below its tokens as
    text. A histogram of caption lengths in tokens is written after each epoch. Records are rejected before the first
    step, or, if streamed, during training; a resumed run counts the streamed ones from 0.
    """

    def __init__(self) -> None:
        self.rejected = Counter[str]()
        """Number of streamed records that this process rejected, by reason."""
        self.lengths: Tensor | None = None
        """Number of captions of each length (0 to text_len tokens) that this process has read in this epoch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rejected = getattr(trainer.datamodule, "rejected", {})  # type: ignore[attr-defined]
        self._log_rejected(trainer, Counter(rejected.get("train", {})))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Batch):
            self.rejected.update(batch.rejected)
        if (tokenizer := getattr(batch, "tokenizer", None)) is None:  # a user's own batches
            return
        images = self._images(batch, pl_module) if self.lengths is None and shows_images(trainer) else None
        if images is not None:
            captions = [tokenizer.decode(ids) for ids in batch.text_tokens[:NUM_IMAGES].tolist()]
            grid = captioned_grid([[to_pil(image)] for image in images], captions, columns=4, side=160)
            log_image(trainer, "data/batch", grid, trainer.global_step)
        if self.lengths is None:
            self.lengths = torch.zeros(tokenizer.text_len + 1, dtype=torch.long, device=batch.text_tokens.device)
        lengths = (batch.text_tokens < tokenizer.vocab_size).sum(1)
        # Comparison instead of bincount, which synchronizes with the GPU.
        self.lengths += (lengths[:, None] == torch.arange(len(self.lengths), device=lengths.device)).sum(0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning sums epoch metrics over processes at their first access. A progress bar accesses them only on rank
        # 0, which would deadlock with the gather below. All ranks therefore access them here first.
        _ = trainer.callback_metrics
        gathered: list[Any] = [self.rejected] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, self.rejected)
        self._log_rejected(trainer, sum(gathered, Counter[str]()))
        if self.lengths is not None and shows_images(trainer):
            log_histogram(trainer, "data/caption_tokens", self.lengths, trainer.global_step)
            self.lengths.zero_()

    def _images(self, batch: Batch | EncodedBatch, pl_module: pl.LightningModule) -> Float[Tensor, "n 3 h w"] | None:
        """Return the first images of a batch; None if it has codes that the module cannot decode."""
        if isinstance(batch, Batch):
            return to_float(batch.images[:NUM_IMAGES])
        if not isinstance(pl_module, LitDALLE):
            return None
        with torch.inference_mode():
            return pl_module.dvae.decode(batch.codes[:NUM_IMAGES])

    def _log_rejected(self, trainer: pl.Trainer, rejected: Counter[str]) -> None:
        scalars = {f"data/rejected/{reason}": float(count) for reason, count in rejected.items()}
        log_scalars(trainer, scalars, trainer.global_step)


class Reconstructions(Callback):
    """Grid of originals above their reconstructions, and a histogram of the used codes, at each validation."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_model(self, pl_module, LitDVAE)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx > 0 or not shows_images(trainer):
            return
        assert isinstance(pl_module, LitDVAE)
        images = pl_module.images(batch)[:NUM_IMAGES]
        with torch.inference_mode():
            reconstructed = pl_module(images)
        rows = [[to_pil(image) for image in row] for row in (images, reconstructed)]
        grid = captioned_grid(rows, ["original", "reconstruction"])
        log_image(trainer, "val/reconstructions", grid, trainer.global_step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if shows_images(trainer):
            assert isinstance(pl_module, LitDVAE)
            log_histogram(trainer, "val/codes", pl_module.val_perplexity.counts, trainer.global_step)


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
        if batch_idx > 0 or not shows_images(trainer):
            return
        assert isinstance(pl_module, LitDALLE)
        pipeline = pl_module.pipeline()
        config = GenerationConfig(num_candidates=self.num_samples, sampling=self.sampling)
        rows = [[sample.image for sample in samples] for samples in pipeline.generate(self.prompts, config)]
        grid = captioned_grid(rows, self.prompts, columns=2)
        log_image(trainer, "samples", grid, trainer.global_step)


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
        if self.curves and shows_images(trainer):
            log_image(trainer, "gradient_scales", plots.plot_gradient_scales(self.curves), trainer.global_step)
