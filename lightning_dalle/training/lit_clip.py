"""Training of a CLIP that ranks candidates."""

import math
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW

from lightning_dalle.checkpoints import check_dvae, check_resume_config, clip_metadata
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.data.sources.encoded import require_images
from lightning_dalle.evaluation.metrics import RetrievalRecall
from lightning_dalle.models.clip import CLIP, CLIPConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.optim.param_groups import OptimizerFactory, configure_optimizer
from lightning_dalle.training.reconstruction_augment import ReconstructionAugment
from lightning_dalle.training.steps import loaded_config, should_log, step_generator

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class LitCLIP(pl.LightningModule):
    """LightningModule that trains CLIP contrastively over the batches of all processes (Radford et al. 2021).

    Args:
        config: shape of CLIP's encoders; in the CLI, its image size is set to that of the data.
        learning_rate: schedule of the learning rate.
        reconstruction_augment: replacement of some training images by reconstructions of a dVAE.
        optimizer: optimizer whose learning rate the schedule sets.
        seed: seed of the choice and the codes of the reconstructed images.
    """

    def __init__(
        self,
        config: CLIPConfig,
        learning_rate: CosineAnneal,
        reconstruction_augment: ReconstructionAugment | None = None,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.learning_rate, self.seed = config, learning_rate, seed
        self.reconstruction_augment = reconstruction_augment
        self.optimizer = OptimizerFactory(optimizer)
        self.clip = CLIP.from_config(config)
        self.val_retrieval = RetrievalRecall()

    def setup(self, stage: str) -> None:
        require_images(self.trainer.datamodule.source)  # type: ignore[attr-defined]
        if self.reconstruction_augment is not None and stage == "fit":
            augment = self.reconstruction_augment
            image_size = self.trainer.datamodule.image_size  # type: ignore[attr-defined]
            check_dvae("the data", augment.dvae, augment.dvae_checkpoint, image_size=image_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        from open_clip.loss import ClipLoss

        scale = self.clip.network.logit_scale
        assert isinstance(scale, Tensor)
        # Every process computes the loss of all processes, with gradients through the gather; DDP averages them.
        contrastive = ClipLoss(gather_with_grad=True, rank=self.global_rank, world_size=self.trainer.world_size)
        images = batch.images
        if self.reconstruction_augment is not None:
            images = self.reconstruction_augment(images, step_generator(self, self.seed, batch_idx))
        # On CPUs, the backward pass of torch's fused attention would take half of a bf16 step.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            image_embeddings, text_embeddings = self.clip.embed_images(images), self.clip.embed_texts(batch.captions)
        with torch.autocast(self.device.type, enabled=False):  # bf16 resolves logits near 100 to 0.5
            loss: Tensor = contrastive(image_embeddings.float(), text_embeddings.float(), scale.exp())
        if should_log(self.trainer):
            self.log_dict({"train/loss": loss, "train/logit_scale": scale.exp()})
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer and clip the logit scale, before a checkpoint or weight average reads the scale."""
        super().optimizer_step(*args, **kwargs)
        scale = self.clip.network.logit_scale
        assert isinstance(scale, Tensor)
        with torch.no_grad():
            scale.clamp_(0, MAX_LOGIT_SCALE)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_retrieval.update(self.clip.embed_images(batch.images), self.clip.embed_texts(batch.captions))

    def on_validation_epoch_end(self) -> None:
        """Log retrieval recall among all images and captions of the split."""
        recall = self.val_retrieval.compute()
        self.val_retrieval.reset()
        for name, value in recall.items():
            self.log(f"val/{name}", value, prog_bar=name == "image_to_text_r1")

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        learning_rate = self.learning_rate.for_max_steps(self.trainer.max_steps)
        return configure_optimizer(self.clip.network, self.optimizer, learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(clip_metadata(self.config))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resume_config(CLIPConfig(**loaded_config(self, checkpoint, "clip")), self.config)
