"""`fit`, `validate`, `test` and `predict`: LightningCLI on our models and data."""

import difflib
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_dalle.errors import UserError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.cli import LightningCLI

EXPECTED_WARNINGS = (
    ".*LeafSpec.*is deprecated",  # Lightning 2.6 on torch 2.15
    "'set_vital' is deprecated",  # torchdata 0.11 on torch 2.15
    ".*LightningCLI's args parameter is intended to run from within Python",  # as it does here
    ".*WeightAveraging callback with a model that overrides the configure_model",  # it fits in memory twice
    ".*you need to define a `flops_per_batch` attribute",  # samples per second are what we log
    r".*module\(s\) in eval mode at the start of training",  # the frozen dVAE's
    ".*Precision .* is not supported by the model summary",  # whose megabytes we leave alone
    ".*does not have many workers",  # decoding small pictures is no bottleneck
)


def sentence(message: str, names: Callable[[], set[str]]) -> str:
    """A message of jsonargparse's without its reports of types that nobody meant, and with the name that was.

    A model's key is tried against "a LightningModule or None", so each mistake in it comes with the news that it is
    not None either.

    Args:
        message: of jsonargparse.
        names: those that could have been meant.
    """
    noise = (
        'Parser key "model":', "Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>",
        "Given value",
    )  # fmt: skip
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    said = " ".join(line for line in lines if not line.startswith(noise))
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", said)
    if unknown is None or "; did you mean" in said:  # a parser within the parser has asked already
        return said
    name = (unknown[1] or unknown[2]).split(".")[-1]
    close = difflib.get_close_matches(name, names(), n=1)
    return f"{said}; did you mean {close[0]}?" if close else said


def _known_names() -> set[str]:
    """Every key that a config can hold for the Trainer, the data and our models."""
    from pytorch_lightning import Trainer

    from lightning_dalle.data.datamodule import CaptionedImageDataModule
    from lightning_dalle.models.clip import CLIPConfig
    from lightning_dalle.models.dvae import DVAEConfig
    from lightning_dalle.models.transformer import TransformerConfig
    from lightning_dalle.schedules import CosineAnneal, HalvedOnPlateau
    from lightning_dalle.training.lit_clip import LitCLIP
    from lightning_dalle.training.lit_dalle import LitDALLE
    from lightning_dalle.training.lit_dvae import LitDVAE
    from lightning_dalle.training.reconstruction_augment import StandIns

    ours = (
        LitDVAE,
        LitDALLE,
        LitCLIP,
        StandIns,
        DVAEConfig,
        TransformerConfig,
        CLIPConfig,
        CosineAnneal,
        HalvedOnPlateau,
    )
    classes = (Trainer, CaptionedImageDataModule, *ours)
    return {name for cls in classes for name in inspect.signature(cls).parameters}


def adopt_shape(config: Any, checkpoint: dict[str, Any], path: Path) -> None:
    """Sets what a config says of a model's shape to what its checkpoint says: only a fit has to be told."""
    model = config.model.class_path.rsplit(".", 1)[-1]
    if model == "LitDALLE" and "dalle_config" in checkpoint:
        shape = checkpoint["dalle_config"]
        text = {"text_len": shape["text_len"], "text_vocab_size": shape["text_vocab_size"]}
        changed = {"config": shape["transformer"], "dvae_checkpoint": path, **text}
        config.data.text_len, config.data.vocab_size = text.values()
    elif model == "LitDVAE" and "dvae_config" in checkpoint and "dalle_config" not in checkpoint:
        changed = {"config": checkpoint["dvae_config"]}
    elif model == "LitCLIP" and "clip_config" in checkpoint:
        changed = {"config": checkpoint["clip_config"]}
    else:
        kinds = {"dalle_config": "a DALL-E", "dvae_config": "a dVAE", "clip_config": "a CLIP"}
        kind = next((kind for key, kind in kinds.items() if key in checkpoint), "no model")
        raise UserError(f"the config's model is a {model}, but {path} holds {kind}: it is of another kind of model")
    from jsonargparse import Namespace

    for name, value in changed.items():
        config.model.init_args[name] = Namespace(value) if isinstance(value, dict) else value
    config.data.image_size = checkpoint["clip_config" if model == "LitCLIP" else "dvae_config"]["image_size"]


def lightning(argv: list[str]) -> "LightningCLI":
    """Parses and runs a verb of Lightning's: the model is chosen in YAML by class_path."""
    import torch
    from jsonargparse import set_parsing_settings
    from pytorch_lightning import LightningModule
    from pytorch_lightning.callbacks import LearningRateMonitor, ThroughputMonitor
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from lightning_dalle.checkpoints import check_image_size, load_dvae, read_checkpoint
    from lightning_dalle.data.datamodule import CaptionedImageDataModule
    from lightning_dalle.training.callbacks.visualization import TrainingData, batch_size

    # An optimizer's moments of what gets no gradient any more, such as a ReLU that is never reached, decay into
    # denormals, which Intel's processors multiply in microcode: a step of the quickstart's dVAE took up to 2.3 times as
    # long. Here, since only threads that start from now on do as this one.
    torch.set_flush_denormal(True)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(sentence(message, _known_names)) from ex

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # A fact that two parts need is stated once. A link to a field that the chosen model lacks is passed over.
            parser.link_arguments("data.image_size", "model.init_args.config.image_size")
            parser.link_arguments("data.text_len", "model.init_args.text_len")
            parser.link_arguments("data.vocab_size", "model.init_args.text_vocab_size")

        def before_instantiate_classes(self) -> None:
            path = self.config[self.subcommand].ckpt_path if self.subcommand else None
            if path not in (None, "last", "best", "hpc") and not Path(path).is_dir():  # a folder is a sharded one
                checkpoint = read_checkpoint(Path(path))
                if self.subcommand != "fit":
                    adopt_shape(self.config[self.subcommand], checkpoint, Path(path))

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                if isinstance(error, UserError) or "Does not validate" not in str(error):
                    raise
                # What a class says of its own arguments comes wrapped in the types that were tried.
                raise UserError(sentence(str(error), _known_names)) from error

        def instantiate_trainer(self, **kwargs: Any) -> "Trainer":
            try:
                return super().instantiate_trainer(**kwargs)
            except UserError:
                raise
            except (ValueError, MisconfigurationException) as error:
                is_of_plugins = "plugins" in str(error)
                hint = " (`--trainer.plugins null` leaves out those of a config)" if is_of_plugins else ""
                raise UserError(f"Lightning's Trainer refuses the options under `trainer`: {error}{hint}") from error

        def before_fit(self) -> None:
            dvae = getattr(self.model, "dvae_checkpoint", None)
            if dvae is not None:  # told before all pictures are looked through, which may take hours
                check_image_size(load_dvae(dvae), self.datamodule.image_size, dvae)

        def before_predict(self) -> None:
            if type(self.model).predict_step is LightningModule.predict_step:
                raise UserError(
                    f"predict writes the codes of a dVAE, but the model is a {type(self.model).__name__}: "
                    "`generate` draws pictures"
                )

    callbacks = [LearningRateMonitor("step"), ThroughputMonitor(batch_size, window_size=10), TrainingData()]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return CLI(
        LightningModule,
        CaptionedImageDataModule,
        subclass_mode_model=True,
        trainer_defaults={"callbacks": callbacks},
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        parser_kwargs={"prog": "python -m lightning_dalle"},
        args=argv,
    )
