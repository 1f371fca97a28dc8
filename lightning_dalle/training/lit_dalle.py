"""Training of the transformer on sequences of caption tokens and the codes of a frozen dVAE."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import AdamW
from torchmetrics import MeanMetric

from lightning_dalle.checkpoints import check_equal_config, dalle_metadata, load_dalle, load_dvae, weights_digest
from lightning_dalle.data.loading.examples import Batch, EncodedBatch
from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.inference.scorers import Scorer
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig, Logits, extend_vocabulary
from lightning_dalle.models.dvae import DVAE, gumbel_noise
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal, HalveOnPlateau
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.distributed.sharding import build_dalle
from lightning_dalle.training.lit_module import LitModule, as_schedule
from lightning_dalle.training.optim.param_groups import OptimizerFactory


class LitDALLE(LitModule):
    """LightningModule that models captions and image codes as one sequence (paper, section 2.2).

    Grid and codebook size come from the dVAE; in the CLI, text length and vocabulary size come from the data.

    Args:
        config: shape of the transformer.
        dvae_checkpoint: checkpoint of a dVAE, or of a DALL-E with its dVAE; required by `fit`. The checkpoints of this
            model contain the frozen dVAE, so the other subcommands read it from their own checkpoint.
        learning_rate: schedule of the learning rate, or its constant value; required by `fit`. The paper warms up to
            4.5e-4 over 5,000 steps, then halves it on plateaus of the validation loss, five times.
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
        tokenizer: tokenizer of the captions, which checkpoints contain; by default that of the batches.
        init_from: trained DALL-E (checkpoint, safetensors file or folder) that a fit starts from. Its vocabulary may be
            smaller: new tokens start from the mean of the old ones. Without a dvae_checkpoint, its dVAE is used.
    """

    kind = "dalle"
    dvae: DVAE
    """Frozen dVAE, assigned by `configure_model`."""
    dalle: DALLE
    """Model to train, assigned by `configure_model`."""

    def __init__(
        self,
        config: TransformerConfig = TransformerConfig(),  # noqa: B008 (frozen)
        dvae_checkpoint: Path | str | None = None,
        learning_rate: CosineAnneal | HalveOnPlateau | float | None = None,
        text_len: int = 256,
        text_vocab_size: int = 16384,
        image_loss_weight: float = 7.0,
        caption_dropout: float = 0.0,
        soft_targets: bool = False,
        code_corruption: float = 0.0,
        checkpoint_activations: bool = False,
        optimizer: OptimizerCallable = AdamW,
        seed: int = 0,
        tokenizer: CaptionTokenizer | None = None,
        init_from: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.save_arguments(locals())
        self.config, self.learning_rate, self.tokenizer = config, as_schedule(learning_rate), tokenizer
        has_dvae = dvae_checkpoint or init_from
        self.dvae_checkpoint, self.init_from = None if has_dvae is None else Path(has_dvae), init_from
        self.text_len, self.text_vocab_size = text_len, text_vocab_size
        self.image_loss_weight, self.caption_dropout = image_loss_weight, caption_dropout
        self.soft_targets, self.code_corruption = soft_targets, code_corruption
        self.checkpoint_activations = checkpoint_activations
        self.optimizer, self.seed = OptimizerFactory(optimizer), seed
        self.attribution: str | None = None
        self.codes_checked = False
        self.val_losses = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_text", "loss_image")})

    def configure_model(self) -> None:
        if not hasattr(self, "dalle"):  # Lightning calls this hook again after setup
            self._build()
        super().configure_model()

    def _build(self) -> None:
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
        self.dalle = build_dalle(config, self.attached_trainer, self.checkpoint_activations)

    @classmethod
    def shape_in(cls, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return the config of the transformer, the sizes of its text, and the file that has its dVAE."""
        config = DALLEConfig.from_dict(checkpoint["dalle_config"])
        sizes = {"text_len": config.text_len, "text_vocab_size": config.text_vocab_size}
        return {"config": config.transformer, "dvae_checkpoint": path, **sizes}

    def setup(self, stage: str) -> None:
        self.configure_model()
        super().setup(stage)
        if isinstance(self.learning_rate, HalveOnPlateau) and stage == "fit":
            check_checkpoint_order(self.trainer)

    def initialize(self, path: Path) -> None:
        """Load the weights of a trained DALL-E of the same shape, whose vocabulary may be smaller."""
        found, size = load_dalle(path), self.dalle.config.text_vocab_size
        if size < found.tokenizer.vocab_size:
            raise UserError(
                f"cannot start from {path}: text_vocab_size is {size}, but its vocabulary has "
                f"{found.tokenizer.vocab_size} tokens; set data.vocab_size to at least that"
            )
        check_equal_config(replace(found.dalle.config, text_vocab_size=size), self.dalle.config, f"start from {path}")
        new_ids = range(found.tokenizer.bpe.get_vocab_size(), size)
        weights: dict[str, Any] = extend_vocabulary(found.dalle.state_dict(), new_ids, size)
        set_model_state_dict(self.dalle, weights, options=StateDictOptions(full_state_dict=True))
        self.tokenizer, self.attribution = self.tokenizer or found.tokenizer, found.attribution

    def check_batch(self, batch: Any) -> None:
        """Raise a UserError if the captions' tokens do not fit the model; see also `LitModule.check_batch`."""
        super().check_batch(batch)
        length, highest = batch.text_tokens.shape[1], int(batch.text_tokens.max())
        if length != self.text_len:
            raise UserError(f"captions have {length} tokens, but text_len is {self.text_len}: set both to one number")
        if highest >= (end := self.text_vocab_size + self.text_len):
            raise UserError(
                f"captions have the token {highest}, but with text_vocab_size={self.text_vocab_size} and "
                f"text_len={self.text_len} all must be below {end}: set text_vocab_size to the tokenizer's"
            )
        theirs, ours, is_fit = batch.tokenizer, self.tokenizer, self.trainer.state.fn == "fit"
        if theirs and ours and theirs.to_json() != ours.to_json() and not (is_fit and theirs.extends(ours)):
            raise UserError(
                "the data has another tokenizer than the model, so that its tokens mean other words: set the data's "
                "tokenizer_file to the model's checkpoint"
            )

    def forward(self, text_tokens: Int[Tensor, "b t"], codes: Int[Tensor, "b i"]) -> Logits:
        """Return the logits of every caption token and image code, each given all tokens and codes before it."""
        return self.dalle(text_tokens, codes)

    def training_step(self, batch: Batch | EncodedBatch, batch_idx: int) -> Tensor:
        self._read_metadata(batch)
        if self.soft_targets:
            codes, targets = self._sample_codes(batch, batch_idx)
        else:
            codes = targets = self._codes(batch)
        text_tokens = self._drop_captions(batch.text_tokens, batch_idx)
        losses = self._losses(text_tokens, self._corrupt(codes, batch_idx), targets)
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

    def predict_step(
        self, batch: Batch | EncodedBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, "b 3 h w"]:
        """Return an image in [0, 1] sampled for each caption; `seed` and the id of the record seed it."""
        seeds = [random.Random(f"{self.seed} {id}").getrandbits(32) for id in batch.ids]
        requests = [Request(caption, seed) for caption, seed in zip(batch.captions, seeds, strict=True)]
        return torch.stack(list(self.pipeline().sample_images(requests, SamplingConfig())))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(dalle_metadata(self.dalle, self.dvae, self.tokenizer, self.attribution))
        if isinstance(self.learning_rate, HalveOnPlateau):
            checkpoint["plateau"] = self.learning_rate.state_dict()
        # EMAWeightAveraging also averages the frozen dVAE, with rounding errors, so its original weights are saved.
        self.dvae.state_dict(destination=checkpoint["state_dict"], prefix="dvae.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = DALLEConfig.from_dict(self.loaded_config(checkpoint))
        check_equal_config(found, self.dalle.config, f"resume from {self.loaded_path}")
        self.attribution = checkpoint["attribution"]
        if checkpoint["tokenizer"] is not None:
            self.tokenizer = CaptionTokenizer.from_json(checkpoint["tokenizer"])
        if isinstance(self.learning_rate, HalveOnPlateau) and "plateau" in checkpoint:
            self.learning_rate.load_state_dict(checkpoint["plateau"])

    def pipeline(self, scorer: Scorer | None = None) -> TextToImage:
        """Return a pipeline that samples images from the model as it is; raise a UserError without a tokenizer."""
        if self.tokenizer is None:
            raise UserError(
                "sampling needs the captions' tokenizer, but neither batches nor checkpoint have one: give LitDALLE a "
                "tokenizer"
            )
        return TextToImage(self.dalle, self.dvae, self.tokenizer, self.attribution, scorer)

    def _read_metadata(self, batch: Batch | EncodedBatch) -> None:
        """Take the tokenizer and the attribution, which checkpoints contain, from a batch that has them."""
        self.tokenizer = batch.tokenizer or self.tokenizer
        if batch.attribution is not None and batch.attribution not in (self.attribution or ""):
            self.attribution = " ".join(filter(None, (self.attribution, batch.attribution)))

    def _codes(self, batch: Batch | EncodedBatch) -> Int[Tensor, "b i"]:
        if isinstance(batch, EncodedBatch):
            if not self.codes_checked and batch.encoding is not None:  # once, before the first step
                config, weights = self.dvae.config, weights_digest(self.dvae)
                batch.encoding.check_dvae(weights, config.grid, config.codebook_size, self.dvae_checkpoint)
            self.codes_checked = True
            return batch.codes.flatten(1)
        images = self.images(batch, self.dvae.config.image_size)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # codes are always computed in fp32
            return self.dvae.encode(images).flatten(1)

    def _sample_codes(
        self, batch: Batch | EncodedBatch, batch_idx: int
    ) -> tuple[Int[Tensor, "b i"], Float[Tensor, "b i k"]]:
        """Return codes sampled from the encoder's distribution, and the distribution."""
        if isinstance(batch, EncodedBatch):
            raise UserError(
                "soft_targets needs the encoder's distribution, but the data contains only argmax codes; set "
                "model.soft_targets to false, or data.source to the images"
            )
        images, generator = self.images(batch, self.dvae.config.image_size), self.step_generator(batch_idx, 2)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            logits = self.dvae.encoder_logits(images)  # (b, k, g, g)
            codes = (logits + gumbel_noise(logits, generator)).argmax(dim=1)  # (b, g, g)
            return codes.flatten(1), logits.softmax(dim=1).flatten(2).movedim(1, 2)

    def _losses(self, text_tokens: Tensor, codes: Int[Tensor, "b i"], targets: Tensor) -> dict[str, Tensor]:
        logits = self(text_tokens, codes)
        return dalle_loss(logits.text, logits.image, text_tokens, targets, self.image_loss_weight)

    def _drop_captions(self, text_tokens: Tensor, batch_idx: int) -> Tensor:
        if not self.caption_dropout:
            return text_tokens
        generator = self.step_generator(batch_idx)
        is_dropped = torch.rand(len(text_tokens), generator=generator, device=self.device) < self.caption_dropout
        return torch.where(is_dropped[:, None], self.dalle.null_caption(len(text_tokens)), text_tokens)

    def _corrupt(self, codes: Int[Tensor, "b i"], batch_idx: int) -> Int[Tensor, "b i"]:
        """Replace some codes by those of the previous image of the batch at the same positions."""
        if not self.code_corruption:
            return codes
        generator = self.step_generator(batch_idx, 1)
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
