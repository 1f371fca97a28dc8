"""Base class of the LightningModules: hyperparameters, schedules, random generators, and checks of batches."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_dalle.checkpoints import NAMES, check_resumable, read_checkpoint
from lightning_dalle.data.images.transforms import to_float
from lightning_dalle.data.loading.examples import Batch, EncodedBatch
from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIPConfig
from lightning_dalle.models.dvae import DVAEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal, HalveOnPlateau
from lightning_dalle.training.optim.adamw16 import PaperAdamW
from lightning_dalle.training.optim.muon import MuonAdamW
from lightning_dalle.training.optim.param_groups import OptimizerFactory, configure_optimizer
from lightning_dalle.training.reconstruction_augment import ReconstructionAugment

Schedule = CosineAnneal | HalveOnPlateau

RESTORABLE: dict[str, type] = {
    f"{known.__module__}.{known.__qualname__}": known
    for known in (
        DVAEConfig, TransformerConfig, CLIPConfig, CosineAnneal, HalveOnPlateau, ReconstructionAugment,
        AdamW, Adam, SGD, MuonAdamW, PaperAdamW,
    )
}  # fmt: skip
"""Classes of hyperparameters that `load_from_checkpoint` creates; a checkpoint cannot name others."""


class LitModule(pl.LightningModule):
    """Base class of the LightningModules, which train under any Trainer, with any loader of `Batch`es."""

    kind: ClassVar[str]
    """Name of the model in checkpoints: dvae, dalle or clip."""
    config_type: ClassVar[type[DVAEConfig | CLIPConfig]]
    """Class of the constructor's `config`, if checkpoints contain that config as it is."""
    learning_rate: Schedule | None
    optimizer: OptimizerFactory
    seed: int
    init_from: Path | str | None
    """Trained model whose weights a fit starts from, with a new optimizer and schedule."""
    is_initialized, has_checked_batch = False, False
    own_path: Path | str | None = None

    def save_arguments(self, arguments: dict[str, Any]) -> None:
        """Save the arguments of the constructor as hyperparameters: numbers, texts, and classes by their names."""
        named = {name: value for name, value in arguments.items() if name not in ("self", "__class__", "tokenizer")}
        self.save_hyperparameters({name: describe(value) for name, value in named.items()})

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Path | str,
        map_location: torch.device | str = "cpu",
        strict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Load a trained model with its hyperparameters.

        Args:
            checkpoint_path: Lightning checkpoint, safetensors file, or folder of a run or an export.
            map_location: device of the model.
            strict: whether the names of all weights must match.
            **arguments: arguments of the constructor that replace those of the checkpoint.

        Raises:
            UserError: if the file is missing or damaged, or has another kind of model.
        """
        checkpoint = read_checkpoint(checkpoint_path, cls.kind)
        saved = {}
        for name, value in checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).items():
            try:
                saved[name] = restore(value)
            except KeyError as class_path:
                rank_zero_warn(
                    f"load_from_checkpoint does not create {class_path}: give {name}, or the default is used"
                )
        saved |= cls.shape_in(checkpoint, Path(checkpoint_path))
        module = cls(**{**cls.accepted(saved), **arguments})
        module.own_path = checkpoint_path
        module.is_initialized = True  # a fit continues from these weights, not from those of `init_from`
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        return module.to(map_location)

    @classmethod
    def shape_in(cls, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return the arguments of the constructor that the models in a checkpoint determine."""
        return {"config": cls.config_type(**checkpoint[f"{cls.kind}_config"])}

    @classmethod
    def accepted(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that the constructor has, which may be a user's subclass's own."""
        parameters = inspect.signature(cls.__init__).parameters
        has_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return {name: value for name, value in arguments.items() if has_all or name in parameters}

    @property
    def attached_trainer(self) -> pl.Trainer | None:
        """Trainer that runs this module, or None."""
        try:
            return self.trainer
        except RuntimeError:  # Lightning's property raises it without a Trainer
            return None

    @property
    def loaded_path(self) -> Path | str | None:
        """Path of the checkpoint that the Trainer or `load_from_checkpoint` loads."""
        return self.own_path if self.attached_trainer is None else self.attached_trainer.ckpt_path

    @property
    def trained(self) -> nn.Module:
        """Model whose parameters are trained."""
        return getattr(self, self.kind)

    def configure_model(self) -> None:
        """Start a fit from the weights of `init_from`, before WeightAveraging copies the weights in its setup."""
        trainer = self.attached_trainer
        if self.init_from is not None and trainer is not None and trainer.state.fn == "fit" and not self.is_initialized:
            self.initialize(Path(self.init_from))
            self.is_initialized = True  # WeightAveraging and Lightning both call this hook

    def setup(self, stage: str) -> None:
        """Raise a UserError if weights would not be stored in fp32."""
        self.has_checked_batch = False
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(
                f"trainer.precision is {precision}, but weights, codes and losses need fp32: set it to bf16-mixed, "
                "16-mixed or 32-true"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the first batch of a run, which a resumed one reads amid an epoch, and that of each epoch."""
        if batch_idx == 0 or not self.has_checked_batch:
            self.check_batch(batch)
            self.has_checked_batch = True

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def check_batch(self, batch: Any) -> None:
        """Raise a UserError if a batch is of another class than this package's, or its images are not in [0, 1]."""
        if not isinstance(batch, Batch | EncodedBatch):
            raise UserError(
                f"{type(self).__name__} needs batches of the class {Batch.__module__}.Batch, but the loader yields "
                f"{type(batch).__name__}: collate its examples to a Batch"
            )
        if isinstance(batch, Batch) and batch.images.is_floating_point():
            low, high = (float(value) for value in batch.images.aminmax())
            if low < 0 or high > 1:
                raise UserError(
                    f"the images have values from {low:g} to {high:g}, but floats must be in [0, 1]: scale them, or "
                    "give uint8"
                )

    def initialize(self, path: Path) -> None:
        """Load the weights of a trained model of the same shape."""
        raise NotImplementedError

    def for_this_fit(self, schedule: Schedule) -> Callable[[int], float]:
        """Return a schedule that lasts as long as the fit if it has no length: `max_steps`, or `max_epochs` of data.

        The optimizer asks for step 0, whose value does not depend on the length of a fit of several steps, before a
        resumed fit restores the state of the data. Counting the batches then would create the loaders, and Lightning
        would not restore them.
        """
        trainer = self.trainer
        if isinstance(schedule, HalveOnPlateau) or trainer.max_epochs in (None, -1):
            return schedule.for_max_steps(trainer.max_steps)

        def value(step: int) -> float:
            is_loaded = trainer.train_dataloader is not None
            return schedule.for_max_steps(int(trainer.estimated_stepping_batches) if is_loaded else sys.maxsize)(step)

        return value

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        if self.learning_rate is None:
            raise UserError("fit needs a learning_rate, but none is given: set model.learning_rate")
        return configure_optimizer(self.trained, self.optimizer, self.for_this_fit(self.learning_rate))

    def step_generator(self, batch_idx: int, *purpose: int) -> Generator:
        """Return a generator that depends only on seed, step, batch index, rank and purpose.

        A resumed run thus samples the same noise as an uninterrupted one. `purpose` distinguishes the uses within a
        step.
        """
        numbers = (self.seed, self.global_step, batch_idx, self.global_rank, *purpose)
        digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
        return Generator(self.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def images(self, batch: Batch | EncodedBatch, image_size: int | None = None) -> Float[Tensor, "b 3 h w"]:
        """Return a batch's images in [0, 1]; raise a UserError if it has codes, or images of another size."""
        if isinstance(batch, EncodedBatch):
            raise UserError(f"{type(self).__name__} needs images, but the batches have codes: give it data with images")
        height, width = batch.images.shape[-2:]
        if image_size is not None and (height, width) != (image_size, image_size):
            raise UserError(
                f"the images have {height}x{width} pixels, but the dVAE needs {image_size}x{image_size}: set "
                f"data.image_size to {image_size}, or choose another dVAE"
            )
        return to_float(batch.images)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe also a user's hyperparameters, since checkpoints are read without running code in them."""
        for key in (self.CHECKPOINT_HYPER_PARAMS_KEY, pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY):
            if key in checkpoint:
                checkpoint[key] = describe(dict(checkpoint[key]))

    def loaded_config(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the config of this kind of model in the checkpoint that is being loaded.

        Raises:
            UserError: if the checkpoint is of another model, or a fit cannot resume from its format or its optimizer.
        """
        models = [name for name in NAMES if f"{name}_config" in checkpoint]
        if models[-1:] != [self.kind]:  # a DALL-E's checkpoint also contains its dVAE
            raise UserError(
                f"cannot load {self.loaded_path} into {type(self).__name__}: it is not a {NAMES[self.kind]} "
                "checkpoint; choose another --ckpt_path"
            )
        if self.attached_trainer is not None and self.attached_trainer.state.fn == "fit":
            check_resumable(checkpoint, self.loaded_path)
            saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
            optimizers = [found.get("optimizer") for found in (saved, self.hparams)]
            theirs, ours = (found.get("class_path") if isinstance(found, dict) else None for found in optimizers)
            if theirs != ours and theirs in RESTORABLE and ours in RESTORABLE:  # not a user's function
                raise UserError(
                    f"cannot resume from {self.loaded_path}: model.optimizer is {ours}, but the checkpoint's is "
                    f"{theirs}; set that, or start a new fit with model.init_from"
                )
        return checkpoint[f"{self.kind}_config"]


def as_schedule(value: Schedule | float | None) -> Schedule | None:
    """Return a schedule; a number is the schedule that always has this value."""
    return CosineAnneal(start=float(value), end=float(value), num_steps=1) if isinstance(value, int | float) else value


def describe(value: Any) -> Any:
    """Return an argument as numbers, texts, lists and dictionaries, in the form that configs have."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    arguments: dict[str, Any] = {}
    kind: Callable[..., Any] | type = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    elif isinstance(value, partial):  # jsonargparse passes the class of an optimizer as the last argument
        kind = next((given for given in value.args[::-1] if isinstance(given, type)), value.func)
        arguments = value.keywords
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": describe(arguments)}


def restore(value: Any) -> Any:
    """Return the argument that `describe` described; raise a KeyError if its class is not `RESTORABLE`."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    known = RESTORABLE[value["class_path"]]
    arguments = {name: restore(argument) for name, argument in value["init_args"].items()}
    return partial(known, **arguments) if issubclass(known, Optimizer) else known(**arguments)
