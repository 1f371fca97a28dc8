"""Training of a CLIP that ranks candidates."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW

from lightning_dalle.checkpoints import check_equal_config, clip_metadata, load_clip, read_checkpoint
from lightning_dalle.data.loading.examples import Batch, EncodedBatch
from lightning_dalle.evaluation.metrics import RetrievalRecall
from lightning_dalle.models.clip import CLIP, CLIPConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_module import LitModule, as_schedule
from lightning_dalle.training.optim.param_groups import OptimizerFactory
from lightning_dalle.training.reconstruction_augment import ReconstructionAugment

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class LitCLIP(LitModule):
    """LightningModule that trains CLIP contrastively over the batches of all processes (Radford et al. 2021).

    Args:
        config: shape of CLIP's encoders; in the CLI, its image size is set to that of the data.
        learning_rate: schedule of the learning rate, or its constant value; required by `fit`.
        reconstruction_augment: replacement of some training images by reconstructions of a dVAE.
        optimizer: optimizer whose learning rate the schedule sets.
        seed: seed of the choice and the codes of the reconstructed images.
        init_from: trained CLIP of the same shape (checkpoint, safetensors file or folder) that a fit starts from.
    """

    kind, config_type = "clip", CLIPConfig

    def __init__(
        self,
        config: CLIPConfig,
        learning_rate: CosineAnneal | float | None = None,
        reconstruction_augment: ReconstructionAugment | None = None,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
        init_from: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.save_arguments(locals())
        self.config, self.learning_rate = config, as_schedule(learning_rate)
        self.seed, self.init_from = seed, init_from
        self.reconstruction_augment = reconstruction_augment
        self.optimizer = OptimizerFactory(optimizer)
        self.clip = CLIP.from_config(config)
        self.val_retrieval = RetrievalRecall()

    def initialize(self, path: Path) -> None:
        """Load the weights of a trained CLIP of the same shape."""
        found = CLIPConfig(**read_checkpoint(path, "clip")["clip_config"])
        check_equal_config(found, self.config, f"start from {path}")
        self.clip.load_state_dict(load_clip(path).state_dict())

    def forward(
        self, images: Float[Tensor, "b 3 h w"], captions: list[str]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Return the unit-length embeddings of images in [0, 1] and of captions."""
        return self.clip.embed_images(images), self.clip.embed_texts(captions)

    def training_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> Tensor:
        from open_clip.loss import ClipLoss

        scale = self.clip.network.logit_scale
        assert isinstance(scale, Tensor)
        # Every process computes the loss of all processes, with gradients through the gather; DDP averages them.
        contrastive = ClipLoss(gather_with_grad=True, rank=self.global_rank, world_size=self.trainer.world_size)
        images = self.images(batch)
        if (augment := self.reconstruction_augment) is not None:
            images = augment(self.images(batch, augment.dvae.config.image_size), self.step_generator(batch_idx))
        # On CPUs, the backward pass of torch's fused attention would take half of a bf16 step.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            image_embeddings, text_embeddings = self(images, batch.captions)
        with torch.autocast(self.device.type, enabled=False):  # bf16 resolves logits near 100 to 0.5
            loss: Tensor = contrastive(image_embeddings.float(), text_embeddings.float(), scale.exp())
        self.log_dict({"train/loss": loss, "train/logit_scale": scale.exp()})
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer and clip the logit scale, before a checkpoint or weight average reads the scale."""
        super().optimizer_step(*args, **kwargs)
        scale = self.clip.network.logit_scale
        assert isinstance(scale, Tensor)
        with torch.no_grad():
            scale.clamp_(0, MAX_LOGIT_SCALE)

    def validation_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> None:
        self.val_retrieval.update(*self(self.images(batch), batch.captions))

    def on_validation_epoch_end(self) -> None:
        """Log retrieval recall among all images and captions of the split."""
        recall = self.val_retrieval.compute()
        self.val_retrieval.reset()
        for name, value in recall.items():
            self.log(f"val/{name}", value, prog_bar=name == "image_to_text_r1")

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(
        self, batch: Batch | EncodedBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Return the unit-length embeddings of the images and of the captions."""
        return self(self.images(batch), batch.captions)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(clip_metadata(self.config))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_equal_config(CLIPConfig(**self.loaded_config(checkpoint)), self.config, f"resume from {self.loaded_path}")
