"""Training of the transformer on sequences of caption tokens and the codes of a frozen dVAE."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torchmetrics import MeanMetric

from lightning_dalle.checkpoints import check_dvae, check_resume_config, dalle_metadata, load_dvae, weights_digest
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.data.loading.examples import EncodedBatch
from lightning_dalle.data.sources.encoded import EncodedImages
from lightning_dalle.errors import UserError
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, gumbel_noise
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal, HalveOnPlateau
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.distributed.sharding import build_dalle
from lightning_dalle.training.optim.param_groups import OptimizerFactory, configure_optimizer
from lightning_dalle.training.steps import loaded_config, should_log, step_generator


class LitDALLE(pl.LightningModule):
    """LightningModule that models captions and image codes as one sequence (paper, section 2.2).

    Grid and codebook size come from the dVAE; in the CLI, text length and vocabulary size come from the data.

    Args:
        config: shape of the transformer.
        dvae_checkpoint: checkpoint of a dVAE, or of a DALL-E with its dVAE; required by `fit`. The checkpoints of this
            model contain the frozen dVAE, so the other subcommands read it from their own checkpoint.
        learning_rate: schedule of the learning rate; required by `fit`. The paper warms up to 4.5e-4 over 5,000 steps,
            then halves it on plateaus of the validation loss, five times.
        text_len: number of tokens of a caption, including padding.
        text_vocab_size: number of entries of the text vocabulary.
        image_loss_weight: weight of the image cross-entropy relative to 1 for text; 7 in the paper (7/8 and 1/8).
        caption_dropout: probability of training without the caption, for classifier-free guidance; 0 in the paper.
        soft_targets: whether to train on codes sampled from the encoder's distribution, with that distribution as
            target, instead of argmax codes. Regularizes a model that is large for its data; the paper tried it and left
            it out (section 2.2). Needs images, because encoded datasets contain argmax codes.
        code_corruption: probability of replacing an input code by the code of another image of the batch; 0 in the
            paper. Makes the model rely more on the caption and tolerate badly sampled codes.
        checkpoint_activations: whether to keep only the input of each block for the backward pass and recompute the
            rest (paper, section 2.4). A step takes a third longer; memory holds the activations of one block.
        optimizer: optimizer whose learning rate the schedule sets.
        seed: seed of caption dropout, sampled codes and code corruption.
    """

    dvae: DVAE
    """Frozen dVAE, assigned by `configure_model`."""
    dalle: DALLE
    """Model to train, assigned by `configure_model`."""

    def __init__(
        self,
        config: TransformerConfig = TransformerConfig(),  # noqa: B008 (frozen)
        dvae_checkpoint: Path | None = None,
        learning_rate: CosineAnneal | HalveOnPlateau | None = None,
        text_len: int = 256,
        text_vocab_size: int = 16384,
        image_loss_weight: float = 7.0,
        caption_dropout: float = 0.0,
        soft_targets: bool = False,
        code_corruption: float = 0.0,
        checkpoint_activations: bool = False,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.dvae_checkpoint, self.learning_rate = config, dvae_checkpoint, learning_rate
        self.text_len, self.text_vocab_size = text_len, text_vocab_size
        self.image_loss_weight, self.caption_dropout = image_loss_weight, caption_dropout
        self.soft_targets, self.code_corruption = soft_targets, code_corruption
        self.checkpoint_activations = checkpoint_activations
        self.optimizer, self.seed = OptimizerFactory(optimizer), seed
        self.loaded_attribution: str | None = None
        self.val_losses = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_text", "loss_image")})

    def configure_model(self) -> None:
        if hasattr(self, "dalle"):
            return  # Lightning calls this hook again after setup
        if self.dvae_checkpoint is None:
            raise UserError("no dVAE is given to encode the images; set model.dvae_checkpoint to its checkpoint")
        self.dvae = load_dvae(self.dvae_checkpoint).requires_grad_(False).to(memory_format=torch.channels_last)
        config = DALLEConfig(
            transformer=self.config,
            text_len=self.text_len,
            text_vocab_size=self.text_vocab_size,
            grid=self.dvae.config.grid,
            codebook_size=self.dvae.config.codebook_size,
        )
        self.dalle = build_dalle(config, self.trainer, self.checkpoint_activations)

    def setup(self, stage: str) -> None:
        self.configure_model()
        if isinstance(self.learning_rate, HalveOnPlateau) and stage == "fit":
            check_checkpoint_order(self.trainer)
        source = self.trainer.datamodule.source  # type: ignore[attr-defined]
        if isinstance(source, EncodedImages):
            if self.soft_targets and stage == "fit":
                raise UserError(
                    f"soft_targets needs the encoder's distribution, but {source.path} contains only argmax codes; set "
                    "model.soft_targets to false, or data.source to the images"
                )
            config = self.dvae.config
            source.check_dvae(weights_digest(self.dvae), config.grid, config.codebook_size, self.dvae_checkpoint)
        image_size = self.trainer.datamodule.image_size  # type: ignore[attr-defined]
        check_dvae("the data", self.dvae, self.dvae_checkpoint, image_size=image_size)

    def training_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> Tensor:
        if self.soft_targets:
            assert isinstance(batch, Batch)
            codes, targets = self._sample_codes(batch, batch_idx)
        else:
            codes = targets = self._codes(batch)
        text_tokens = self._drop_captions(batch.text_tokens, batch_idx)
        losses = self._losses(text_tokens, self._corrupt(codes, batch_idx), targets)
        if should_log(self.trainer):
            self.log_dict({f"train/{name}": value for name, value in losses.items()})
            self.log("train/bits_per_code", losses["loss_image"] / math.log(2))
        truncated = batch.is_truncated.sum().float()
        self.log("data/captions_truncated", truncated, reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        return losses["loss"]

    def validation_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> None:
        codes = self._codes(batch)
        losses = self._losses(batch.text_tokens, codes, codes)
        for name, metric in self.val_losses.items():
            assert isinstance(metric, MeanMetric)
            metric.update(losses[name], weight=len(batch.text_tokens))
            self.log(f"val/{name}", metric, prog_bar=name == "loss")

    def on_validation_epoch_end(self) -> None:
        bits = self.val_losses["loss_image"].compute() / math.log(2)  # type: ignore[operator]
        self.log("val/bits_per_code", bits, prog_bar=True)
        is_training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if isinstance(self.learning_rate, HalveOnPlateau) and is_training:
            self.learning_rate.step(float(self.val_losses["loss"].compute()))  # type: ignore[operator]

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        if self.learning_rate is None:
            raise UserError("fit needs model.learning_rate, but none is given; set it in the config")
        learning_rate = self.learning_rate.for_max_steps(self.trainer.max_steps)
        return configure_optimizer(self.dalle, self.optimizer, learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(dalle_metadata(self.dalle, self.dvae, self.tokenizer, self.attribution))
        if isinstance(self.learning_rate, HalveOnPlateau):
            checkpoint["plateau"] = self.learning_rate.state_dict()
        # EMAWeightAveraging also averages the frozen dVAE, with rounding errors, so its original weights are saved.
        self.dvae.state_dict(destination=checkpoint["state_dict"], prefix="dvae.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = DALLEConfig.from_dict(loaded_config(self, checkpoint, "dalle"))
        check_resume_config(found, self.dalle.config)
        self.loaded_attribution = checkpoint["attribution"]
        if isinstance(self.learning_rate, HalveOnPlateau) and "plateau" in checkpoint:
            self.learning_rate.load_state_dict(checkpoint["plateau"])

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Tokenizer of the captions, from the DataModule."""
        return self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]

    @property
    def attribution(self) -> str | None:
        """Credit line that the licence of the training images requires on generated images."""
        if self.trainer.state.fn != "fit":
            return self.loaded_attribution  # the data may not be the training data
        return getattr(self.trainer.datamodule.source, "attribution", None)  # type: ignore[attr-defined]

    def _codes(self, batch: Batch | EncodedBatch) -> Int[Tensor, "b i"]:
        if isinstance(batch, EncodedBatch):
            return batch.codes.flatten(1)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # codes are always computed in fp32
            return self.dvae.encode(batch.images).flatten(1)

    def _sample_codes(self, batch: Batch, batch_idx: int) -> tuple[Int[Tensor, "b i"], Float[Tensor, "b i k"]]:
        """Return codes sampled from the encoder's distribution, and the distribution."""
        generator = step_generator(self, self.seed, batch_idx, 2)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            logits = self.dvae.encoder_logits(batch.images)  # (b, k, g, g)
            codes = (logits + gumbel_noise(logits, generator)).argmax(dim=1)  # (b, g, g)
            return codes.flatten(1), logits.softmax(dim=1).flatten(2).movedim(1, 2)

    def _losses(self, text_tokens: Tensor, codes: Int[Tensor, "b i"], targets: Tensor) -> dict[str, Tensor]:
        logits = self.dalle(text_tokens, codes)
        return dalle_loss(logits.text, logits.image, text_tokens, targets, self.image_loss_weight)

    def _drop_captions(self, text_tokens: Tensor, batch_idx: int) -> Tensor:
        if not self.caption_dropout:
            return text_tokens
        generator = step_generator(self, self.seed, batch_idx)
        is_dropped = torch.rand(len(text_tokens), generator=generator, device=self.device) < self.caption_dropout
        return torch.where(is_dropped[:, None], self.dalle.null_caption(len(text_tokens)), text_tokens)

    def _corrupt(self, codes: Int[Tensor, "b i"], batch_idx: int) -> Int[Tensor, "b i"]:
        """Replace some codes by those of the previous image of the batch at the same positions."""
        if not self.code_corruption:
            return codes
        generator = step_generator(self, self.seed, batch_idx, 1)
        is_replaced = torch.rand(codes.shape, generator=generator, device=self.device) < self.code_corruption
        return torch.where(is_replaced, codes.roll(1, dims=0), codes)


def check_checkpoint_order(trainer: pl.Trainer) -> None:
    """Raise a UserError if a callback could save a checkpoint before that step's validation.

    Lightning runs step and time triggers before the validation of the same step, and a resumed run does not repeat
    that validation. A learning rate that is halved on plateaus would then miss its loss.
    """
    for callback in trainer.checkpoint_callbacks:
        for option in ("every_n_train_steps", "train_time_interval"):
            if value := getattr(callback, f"_{option}", None):
                raise UserError(
                    "a learning_rate that is halved on plateaus needs checkpoints after validations, but "
                    f"{option}={value} of ModelCheckpoint saves before them; remove {option}"
                )
