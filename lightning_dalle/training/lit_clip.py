"""Trains a CLIP from scratch, to rank candidates by."""

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

from lightning_dalle.checkpoints import check_same, clip_record
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.data.sources.encoded import needs_pictures
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.metrics import Retrieval
from lightning_dalle.models.clip import CLIP, CLIPConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.optim.param_groups import NewOptimizer, configure
from lightning_dalle.training.reconstruction_augment import StandIns
from lightning_dalle.training.steps import is_logged, step_generator

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class LitCLIP(pl.LightningModule):
    """Tells which caption of a batch belongs to which image and the other way round, the batches of all processes as
    one (Radford et al. 2021).

    Args:
        config: shape of the two towers; the image size is linked to the data's.
        learning_rate: by optimizer step.
        stand_ins: train on pictures as a DALL-E will draw them, too.
        optimizer: takes parameter groups; its learning rate is set by the schedule.
        seed: of the stand-ins.
    """

    def __init__(
        self,
        config: CLIPConfig,
        learning_rate: CosineAnneal,
        stand_ins: StandIns | None = None,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.learning_rate, self.stand_ins, self.seed = config, learning_rate, stand_ins, seed
        self.optimizer = NewOptimizer(optimizer)
        self.clip = CLIP.new(config)
        self.val_retrieval = Retrieval()

    def setup(self, stage: str) -> None:
        needs_pictures(self.trainer.datamodule.source)  # type: ignore[attr-defined]
        if self.stand_ins is not None and stage == "fit":
            self.stand_ins.check(self.trainer.datamodule.image_size)  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        from open_clip.loss import ClipLoss

        scale = self.clip.network.logit_scale
        assert isinstance(scale, Tensor)
        # Every process computes the loss of all, with gradients through the gather: DDP's mean of them is that loss's.
        contrastive = ClipLoss(gather_with_grad=True, rank=self.global_rank, world_size=self.trainer.world_size)
        seen = batch.images
        if self.stand_ins is not None:
            seen = self.stand_ins(
                seen, step_generator(self.device, self.seed, self.global_step, batch_idx, self.global_rank)
            )
        # open_clip leaves the kernel to torch, whose fused one for CPUs takes half of the step in bf16, backward.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            images, texts = self.clip.embed_images(seen), self.clip.embed_texts(batch.captions)
        with torch.autocast(self.device.type, enabled=False):  # near 100, logits in bf16 are 0.5 apart
            loss: Tensor = contrastive(images.float(), texts.float(), scale.exp())
        if is_logged(self.trainer):
            self.log_dict({"train/loss": loss, "train/logit_scale": scale.exp()})
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the logits from growing without end, before a checkpoint or an average sees them."""
        super().optimizer_step(*args, **kwargs)
        scale = self.clip.network.logit_scale
        assert isinstance(scale, Tensor)
        with torch.no_grad():
            scale.clamp_(0, MAX_LOGIT_SCALE)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_retrieval.update(self.clip.embed_images(batch.images), self.clip.embed_texts(batch.captions))

    def on_validation_epoch_end(self) -> None:
        """Among all pictures and captions of the split."""
        found = self.val_retrieval.compute()
        self.val_retrieval.reset()
        for name, value in found.items():
            self.log(f"val/{name}", value, prog_bar=name == "image_to_text_r1")

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return configure(self.clip.network, self.optimizer, self.learning_rate.over(self.trainer.max_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(clip_record(self.config))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "clip_config" not in checkpoint:
            raise UserError("the checkpoint to go on from holds no CLIP: it is of another kind of model")
        found = CLIPConfig(**checkpoint["clip_config"])
        check_same(found, self.config)
