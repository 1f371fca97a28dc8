"""Training of the discrete VAE."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_dalle.checkpoints import check_equal_config, dvae_metadata, load_dvae
from lightning_dalle.data.loading.examples import Batch, EncodedBatch
from lightning_dalle.evaluation.metrics import CodebookPerplexity
from lightning_dalle.losses import dvae_loss
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_module import LitModule, as_schedule
from lightning_dalle.training.optim.param_groups import OptimizerFactory


class LitDVAE(LitModule):
    """LightningModule that maximizes the evidence lower bound of images under relaxed codes (paper, section 2.1).

    Args:
        config: shape of the dVAE; every subcommand except `fit` reads it from the checkpoint.
        learning_rate: schedule of the learning rate, or its constant value; by default the paper's schedule, 1e-4 to
            1.25e-6 over 1,200,000 steps.
        temperature: schedule of the relaxation temperature; by default the paper's, 1 to 1/16 over 150,000 steps.
        kl_weight: schedule of the KL weight beta; by default the paper's, 0 to 6.6 over 5,000 steps.
        codebook_entropy_weight: weight of a bonus for the entropy of the batch's mean posterior; 0 in the paper.
        mse_weight: weight of the mean squared error of the reconstruction; 0 in the paper.
        optimizer: optimizer whose learning rate the schedule sets.
        seed: seed of the Gumbel noise.
        init_from: trained dVAE or DALL-E (checkpoint, safetensors file or folder) from whose dVAE a fit starts.
    """

    kind, config_type = "dvae", DVAEConfig

    def __init__(
        self,
        config: DVAEConfig = DVAEConfig(),  # noqa: B008 (frozen)
        learning_rate: CosineAnneal | float | None = None,
        temperature: CosineAnneal | None = None,
        kl_weight: CosineAnneal | None = None,
        codebook_entropy_weight: float = 0.0,
        mse_weight: float = 0.0,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
        init_from: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.save_arguments(locals())
        self.learning_rate = as_schedule(learning_rate) or CosineAnneal(start=1e-4, end=1.25e-6, num_steps=1_200_000)
        self.temperature = temperature or CosineAnneal(start=1.0, end=1 / 16, num_steps=150_000)
        self.kl_weight = kl_weight or CosineAnneal(start=0.0, end=6.6, num_steps=5_000)
        self.codebook_entropy_weight, self.mse_weight = codebook_entropy_weight, mse_weight
        self.optimizer, self.seed, self.init_from = OptimizerFactory(optimizer), seed, init_from
        # On a CPU, convolutions of few channels are 1.4 times as fast in this layout; on a GPU it makes no difference.
        self.dvae = DVAE(config).to(memory_format=torch.channels_last)
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.val_perplexity = CodebookPerplexity(config.codebook_size)
        self.val_losses = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_pixels", "kl")})

    def initialize(self, path: Path) -> None:
        """Load the weights of a trained dVAE of the same shape."""
        found = load_dvae(path)
        check_equal_config(found.config, self.dvae.config, f"start from {path}")
        self.dvae.load_state_dict(found.state_dict())

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the reconstructions of images in [0, 1] from their argmax codes."""
        return self.dvae.decode(self.dvae.encode(images))

    def training_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> Tensor:
        images, generator = self.images(batch, self.dvae.config.image_size), self.step_generator(batch_idx)
        schedules = self.for_this_fit(self.temperature), self.for_this_fit(self.kl_weight)
        temperature, kl_weight = (schedule(self.global_step) for schedule in schedules)
        logits, pixels = self.dvae(images, temperature, generator)
        losses = dvae_loss(images, logits, pixels, kl_weight, self.codebook_entropy_weight, self.mse_weight)
        self.log_dict({f"train/{name}": value for name, value in losses.items()})
        self.log_dict({"schedule/temperature": temperature, "schedule/kl_weight": kl_weight})
        return losses["loss"]

    def validation_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> None:
        """Log the losses, PSNR and codebook perplexity of argmax codes, because the transformer is trained on them.

        Outside a fit the step is unknown, so the loss uses the final KL weight.
        """
        images = self.images(batch, self.dvae.config.image_size)
        logits = self.dvae.encoder_logits(images)
        codes = logits.argmax(dim=1)
        pixels = self.dvae.reconstruct(codes)
        is_fit = self.trainer.state.fn == "fit"
        kl_weight = self.for_this_fit(self.kl_weight)(self.global_step) if is_fit else self.kl_weight.end
        losses = dvae_loss(images, logits, pixels, kl_weight, self.codebook_entropy_weight, self.mse_weight)
        for name, metric in self.val_losses.items():
            assert isinstance(metric, MeanMetric)
            metric.update(losses[name], weight=len(images))
            self.log(f"val/{name}", metric)
        self.val_psnr.update(pixels.image, images)
        self.val_perplexity.update(codes)
        self.log("val/psnr", self.val_psnr, prog_bar=True)
        self.log("val/codebook_perplexity", self.val_perplexity, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        with self.val_perplexity.sync_context():  # counts the codes of all processes
            self.log("val/dead_codes", float(self.val_perplexity.num_unused))

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(
        self, batch: Batch | EncodedBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> Int[Tensor, "b g g"]:
        """Return the argmax codes of the images, computed in fp32 as when the transformer is trained."""
        with torch.autocast(self.device.type, enabled=False):
            return self.dvae.encode(self.images(batch, self.dvae.config.image_size))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(dvae_metadata(self.dvae))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_equal_config(
            DVAEConfig(**self.loaded_config(checkpoint)), self.dvae.config, f"resume from {self.loaded_path}"
        )
