"""Trains the transformer on captions followed by the codes of a frozen dVAE."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torchmetrics import MeanMetric

from lightning_dalle.checkpoints import check_image_size, check_same, dalle_record, load_dvae, weights_digest
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.data.loading.examples import EncodedBatch
from lightning_dalle.data.sources.encoded import EncodedPictures
from lightning_dalle.errors import UserError
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, gumbel_noise
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal, HalvedOnPlateau
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.distributed.sharding import build
from lightning_dalle.training.optim.param_groups import NewOptimizer, configure
from lightning_dalle.training.steps import is_logged, step_generator


class LitDALLE(pl.LightningModule):
    """Models captions and image codes as one stream (paper, section 2.2).

    Grid and codebook are the dVAE's; text length and vocabulary are linked to the data's.

    Args:
        config: shape of the transformer.
        dvae_checkpoint: where the frozen dVAE is read from, a dVAE's or a DALL-E's; needed for a fit. It is kept in
            this model's checkpoints too, and `test` and its like take it from the one that they are given.
        learning_rate: by optimizer step (the paper warms up to 4.5e-4 over 5,000, then halves it on each plateau of the
            validation loss, five times); needed for a fit.
        text_len: tokens of a caption, padding included.
        text_vocab_size: ids of caption tokens.
        image_loss_weight: of the image's cross-entropy against the text's 1 (7 in the paper: 7/8 and 1/8).
        caption_dropout: probability of training on no caption, for classifier-free guidance; 0 in the paper.
        soft_codes: train on codes that are drawn from the encoder's distribution at every step, with that distribution
            as the target, rather than on its argmax. It regularises a model that is large for its data; the paper's is
            not, and leaves it out (section 2.2). Needs pictures: codes that were encoded beforehand are the argmax.
        code_corruption: probability of reading another picture's code instead of the own one, in training; 0 in the
            paper. It teaches to go on from codes that were sampled wrong, and to trust the caption.
        checkpoint_activations: keep only the input of each block for the backward pass, and compute the rest again
            (paper, section 2.4): a third more time, for a memory of one block's activations.
        optimizer: takes parameter groups; its learning rate is set by the schedule.
        seed: of the caption dropout, the drawn codes and their corruption.
    """

    def __init__(
        self,
        config: TransformerConfig = TransformerConfig(),  # noqa: B008 (frozen)
        dvae_checkpoint: Path | None = None,
        learning_rate: CosineAnneal | HalvedOnPlateau | None = None,
        text_len: int = 256,
        text_vocab_size: int = 16384,
        image_loss_weight: float = 7.0,
        caption_dropout: float = 0.0,
        soft_codes: bool = False,
        code_corruption: float = 0.0,
        checkpoint_activations: bool = False,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.dvae_checkpoint, self.learning_rate = config, dvae_checkpoint, learning_rate
        self.text_len, self.text_vocab_size = text_len, text_vocab_size
        self.image_loss_weight, self.caption_dropout = image_loss_weight, caption_dropout
        self.soft_codes, self.code_corruption = soft_codes, code_corruption
        self.checkpoint_activations = checkpoint_activations
        self.optimizer, self.seed = NewOptimizer(optimizer), seed
        self.loaded_attribution: str | None = None
        self.dvae: DVAE | None = None
        self.dalle: DALLE | None = None
        self.val_losses = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_text", "loss_image")})

    def configure_model(self) -> None:
        if self.dalle is None:
            if self.dvae_checkpoint is None:
                raise UserError("there is no dVAE to make codes with: name its checkpoint as dvae_checkpoint")
            dvae = load_dvae(self.dvae_checkpoint).requires_grad_(False).to(memory_format=torch.channels_last)
            self.dvae = dvae
            config = DALLEConfig(
                transformer=self.config,
                text_len=self.text_len,
                text_vocab_size=self.text_vocab_size,
                grid=dvae.config.grid,
                codebook_size=dvae.config.codebook_size,
            )
            self.dalle = build(config, self.trainer, self.checkpoint_activations)

    def setup(self, stage: str) -> None:
        self.configure_model()
        assert self.dvae is not None
        if isinstance(self.learning_rate, HalvedOnPlateau) and stage == "fit":
            check_saves(self.trainer)
        source = self.trainer.datamodule.source  # type: ignore[attr-defined]
        if isinstance(source, EncodedPictures):
            if self.soft_codes and stage == "fit":
                raise UserError(
                    f"soft_codes draws from the encoder's distribution, but {source.path} holds its likeliest codes "
                    "alone: set soft_codes to false, or train from the pictures"
                )
            config = self.dvae.config
            source.check(weights_digest(self.dvae), config.grid, config.codebook_size, self.dvae_checkpoint)
        image_size = self.trainer.datamodule.image_size  # type: ignore[attr-defined]
        check_image_size(self.dvae, image_size, self.dvae_checkpoint)

    def training_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> Tensor:
        if self.soft_codes:
            assert isinstance(batch, Batch)
            codes, targets = self._drawn_codes(batch, batch_idx)
        else:
            codes = targets = self._codes(batch)
        text_tokens = self._drop_captions(batch.text_tokens, batch_idx)
        losses = self._losses(text_tokens, self._corrupt(codes, batch_idx), targets)
        if is_logged(self.trainer):
            self.log_dict({f"train/{name}": value for name, value in losses.items()})
            self.log("train/bits_per_code", losses["loss_image"] / math.log(2))
        cut = batch.is_cut.sum().float()
        self.log("data/captions_cut", cut, reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
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
        if isinstance(self.learning_rate, HalvedOnPlateau) and is_training:
            self.learning_rate.observe(float(self.val_losses["loss"].compute()))  # type: ignore[operator]

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        assert self.dalle is not None
        if self.learning_rate is None:
            raise UserError("a fit needs a learning_rate, but none is given")
        return configure(self.dalle, self.optimizer, self.learning_rate.over(self.trainer.max_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.dalle is not None
        assert self.dvae is not None
        checkpoint.update(dalle_record(self.dalle, self.dvae, self.tokenizer, self.attribution))
        if isinstance(self.learning_rate, HalvedOnPlateau):
            checkpoint["plateau"] = self.learning_rate.state_dict()
        # EMAWeightAveraging averages all it finds: the frozen dVAE too, up to rounding. Its own weights are kept.
        weights = checkpoint["state_dict"]
        weights.update({f"dvae.{name}": value for name, value in self.dvae.state_dict().items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "dalle_config" not in checkpoint:
            raise UserError("the checkpoint to go on from holds no DALL-E: it is of another kind of model")
        self.loaded_attribution = checkpoint["attribution"]
        found = DALLEConfig.from_dict(checkpoint["dalle_config"])
        assert self.dalle is not None
        check_same(found, self.dalle.config)
        if isinstance(self.learning_rate, HalvedOnPlateau) and "plateau" in checkpoint:
            self.learning_rate.load_state_dict(checkpoint["plateau"])

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """The data's."""
        return self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]

    @property
    def attribution(self) -> str | None:
        """What the licence of the training pictures asks of what is made from them."""
        if self.trainer.state.fn != "fit":
            return self.loaded_attribution  # the data at hand is not what the model was trained on
        return getattr(self.trainer.datamodule.source, "attribution", None)  # type: ignore[attr-defined]

    def _codes(self, batch: Batch | EncodedBatch) -> Int[Tensor, "b i"]:
        if isinstance(batch, EncodedBatch):
            return batch.codes.flatten(1)
        assert self.dvae is not None
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # codes are the same in any precision
            return self.dvae.encode(batch.images).flatten(1)

    def _drawn_codes(self, batch: Batch, batch_idx: int) -> tuple[Int[Tensor, "b i"], Float[Tensor, "b i k"]]:
        """Codes drawn from the encoder's distribution, and the distribution."""
        assert self.dvae is not None
        generator = step_generator(self.device, self.seed, self.global_step, batch_idx, self.global_rank, 2)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            logits = self.dvae.encoder_logits(batch.images)  # (b, k, g, g)
            codes = (logits + gumbel_noise(logits, generator)).argmax(dim=1)  # (b, g, g)
            return codes.flatten(1), logits.softmax(dim=1).flatten(2).movedim(1, 2)

    def _losses(
        self,
        text_tokens: Int[Tensor, "b t"],
        codes: Int[Tensor, "b i"],
        targets: Int[Tensor, "b i"] | Float[Tensor, "b i k"],
    ) -> dict[str, Tensor]:
        """Of predicting the targets, codes or distributions over them, from the codes before them."""
        assert self.dalle is not None
        logits = self.dalle(text_tokens, codes)
        return dalle_loss(logits.text, logits.image, text_tokens, targets, self.image_loss_weight)

    def _drop_captions(self, text_tokens: Tensor, batch_idx: int) -> Tensor:
        if not self.caption_dropout:
            return text_tokens
        assert self.dalle is not None
        generator = step_generator(self.device, self.seed, self.global_step, batch_idx, self.global_rank)
        is_dropped = torch.rand(len(text_tokens), generator=generator, device=self.device) < self.caption_dropout
        return torch.where(is_dropped[:, None], self.dalle.null_caption(len(text_tokens)), text_tokens)

    def _corrupt(self, codes: Int[Tensor, "b i"], batch_idx: int) -> Int[Tensor, "b i"]:
        """Some codes replaced by those that the batch's previous picture has in the same places."""
        if not self.code_corruption:
            return codes
        generator = step_generator(self.device, self.seed, self.global_step, batch_idx, self.global_rank, 1)
        is_other = torch.rand(codes.shape, generator=generator, device=self.device) < self.code_corruption
        return torch.where(is_other, codes.roll(1, dims=0), codes)


def check_saves(trainer: pl.Trainer) -> None:
    """Raises an error if a checkpoint could be without the validation of its step.

    Lightning saves by steps, and by time, before it validates, and a run that goes on from there does not make up for
    it: that validation would never count for a plateau.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        for option in ("every_n_train_steps", "train_time_interval"):
            if value := getattr(callback, f"_{option}"):
                raise UserError(
                    "a learning_rate that is halved on plateaus has to be saved after validations, but "
                    f"{option}={value} of ModelCheckpoint saves before them: leave it out"
                )
