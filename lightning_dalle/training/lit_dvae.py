"""Trains the discrete VAE."""

from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Int
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_dalle.checkpoints import check_same, dvae_record
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.data.sources.encoded import needs_pictures
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.metrics import CodebookUse
from lightning_dalle.losses import dvae_loss
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.optim.param_groups import NewOptimizer, configure
from lightning_dalle.training.steps import is_logged, step_generator


class LitDVAE(pl.LightningModule):
    """Maximises the ELB of images under relaxed codes (paper, section 2.1).

    The shape and the schedules are the paper's where none are given.

    Args:
        config: shape of the dVAE; all verbs but a fit take it from the checkpoint.
        learning_rate: by optimizer step (1e-4 to 1.25e-6 over 1,200,000 in the paper).
        temperature: of the relaxation, by optimizer step (1 to 1/16 over 150,000 in the paper).
        kl_weight: beta, by optimizer step (0 to 6.6 over 5,000 in the paper).
        usage_bonus: weight of the entropy of the batch's mean posterior; 0 in the paper.
        mse_weight: weight of the mean squared error of the reconstruction; 0 in the paper.
        optimizer: takes the parameters; its learning rate is set by the schedule.
        seed: of the Gumbel noise.
    """

    def __init__(
        self,
        config: DVAEConfig = DVAEConfig(),  # noqa: B008 (frozen)
        learning_rate: CosineAnneal | None = None,
        temperature: CosineAnneal | None = None,
        kl_weight: CosineAnneal | None = None,
        usage_bonus: float = 0.0,
        mse_weight: float = 0.0,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate or CosineAnneal(start=1e-4, end=1.25e-6, num_steps=1_200_000)
        self.temperature = temperature or CosineAnneal(start=1.0, end=1 / 16, num_steps=150_000)
        self.kl_weight = kl_weight or CosineAnneal(start=0.0, end=6.6, num_steps=5_000)
        self.usage_bonus, self.mse_weight = usage_bonus, mse_weight
        self.optimizer, self.seed = NewOptimizer(optimizer), seed
        # Convolutions of few channels are 1.4 times as fast in this layout on a CPU, and as fast as ever on a GPU.
        self.dvae = DVAE(config).to(memory_format=torch.channels_last)
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.val_use = CodebookUse(config.codebook_size)
        self.val_losses = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_pixels", "kl")})

    def setup(self, stage: str) -> None:
        needs_pictures(self.trainer.datamodule.source)  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.global_step
        generator = step_generator(self.device, self.seed, step, batch_idx, self.global_rank)
        temperature, kl_weight = self.temperature_at(step), self.kl_weight_at(step)
        logits, pixels = self.dvae(batch.images, temperature, generator)
        losses = dvae_loss(batch.images, logits, pixels, kl_weight, self.usage_bonus, self.mse_weight)
        if is_logged(self.trainer):
            self.log_dict({f"train/{name}": value for name, value in losses.items()})
            self.log_dict({"schedule/temperature": temperature, "schedule/kl_weight": kl_weight})
        return losses["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Codes by argmax, without noise, as the transformer will see them; outside a fit by the last KL weight."""
        images = batch.images
        logits = self.dvae.encoder_logits(images)
        codes = logits.argmax(dim=1)
        pixels = self.dvae.reconstruct(codes)
        is_of_fit = self.trainer.state.fn == TrainerFn.FITTING  # no other verb knows the step
        kl_weight = self.kl_weight_at(self.global_step) if is_of_fit else self.kl_weight.end
        losses = dvae_loss(images, logits, pixels, kl_weight, self.usage_bonus, self.mse_weight)
        for name, metric in self.val_losses.items():
            assert isinstance(metric, MeanMetric)
            metric.update(losses[name], weight=len(images))
            self.log(f"val/{name}", metric)
        self.val_psnr.update(pixels.image, images)
        self.val_use.update(codes)
        self.log("val/psnr", self.val_psnr, prog_bar=True)
        self.log("val/codebook_perplexity", self.val_use, prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Int[Tensor, "b g g"]:
        """Codes as the transformer's training makes them, in fp32 whatever the precision."""
        with torch.autocast(self.device.type, enabled=False):
            return self.dvae.encode(batch.images)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps = self.trainer.max_steps
        self.temperature_at, self.kl_weight_at = self.temperature.over(steps), self.kl_weight.over(steps)
        return configure(self.dvae, self.optimizer, self.learning_rate.over(steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(dvae_record(self.dvae))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "dvae_config" not in checkpoint or "dalle_config" in checkpoint:
            raise UserError("the checkpoint to go on from is not a dVAE's: it is of another kind of model")
        found = DVAEConfig(**checkpoint["dvae_config"])
        check_same(found, self.dvae.config)
