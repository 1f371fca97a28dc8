"""Subcommands `fit`, `validate`, `test` and `predict`: LightningCLI with this package's models and data."""

import difflib
import re
import signal
import sys
import traceback
import warnings
from dataclasses import is_dataclass
from pathlib import Path
from pydoc import locate
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_dalle.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from pytorch_lightning import Trainer
    from pytorch_lightning.cli import LightningCLI

    from lightning_dalle.training.lit_module import LitModule

EXPECTED_WARNINGS = (
    ".*LeafSpec.*is deprecated",  # Lightning 2.6 on torch 2.15
    ".*LightningCLI's args parameter is intended to run from within Python",  # run_lightning passes argv as args
    ".*WeightAveraging callback with a model that overrides the configure_model",  # two copies fit in memory
    ".*you need to define a `flops_per_batch` attribute",  # ThroughputMonitor logs samples per second only
    r".*module\(s\) in eval mode at the start of training",  # the frozen dVAE
    ".*Precision .* is not supported by the model summary",  # only its estimate of megabytes is affected
    ".*does not have many workers",  # decoding small images is no bottleneck
)
"""Regular expressions of warnings that need no action from the user."""


def raise_user_error(parser: "ArgumentParser", message: str, ex: Exception | None = None) -> NoReturn:
    """Raise a UserError that suggests the valid key nearest to an unknown one; replaces `ArgumentParser.error`.

    Nested config keys have a parser of their own, so only the parser that reports the error lists the valid keys.
    """
    message = clean_error(message)
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", message)
    if unknown and "; did you mean" not in message:  # a nested parser may have suggested a key already
        keys = {key.rpartition(".")[2] for key in parser.get_defaults(skip_validation=True).keys()}  # noqa: SIM118
        close = difflib.get_close_matches((unknown[1] or unknown[2]).rpartition(".")[2], keys, n=1)
        message += "".join(f"; did you mean {key}?" for key in close)
    raise UserError(message) from ex


def clean_error(message: str) -> str:
    """Return an error message of jsonargparse as one line, without its list of the types that it tried.

    The config key `model` accepts a LightningModule or None, so each mistake below it is also reported as "not None".
    """
    noise = (
        'Parser key "model":', "Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>",
        "Given value",
    )  # fmt: skip
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    return " ".join(line for line in lines if not line.startswith(noise))


def lit_module(class_path: str) -> "type[LitModule] | None":
    """Return a LightningModule of this package or a subclass of one, and None for any other."""
    from lightning_dalle.training.lit_module import LitModule

    found = locate(class_path)
    return found if isinstance(found, type) and issubclass(found, LitModule) else None


def use_checkpoint_shape(config: Any, module: "type[LitModule]", checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the shapes in a config by those of its checkpoint, so that only configs of `fit` must state them."""
    from jsonargparse import Namespace

    shape = module.shape_in(checkpoint, path)
    for name, value in module.accepted(shape).items():
        config.model.init_args[name] = Namespace(vars(value)) if is_dataclass(value) else value
    if module.kind == "dalle":
        config.data.text_len, config.data.vocab_size = shape["text_len"], shape["text_vocab_size"]
    config.data.image_size = checkpoint["clip_config" if module.kind == "clip" else "dvae_config"]["image_size"]


def use_initial_shape(config: Any, module: "type[LitModule]") -> None:
    """Use the shape of `model.init_from` in a config of fit, and of a DALL-E also the tokenizer and the dVAE."""
    from lightning_dalle.checkpoints import read_checkpoint

    arguments, vocab_size = config.model.init_args, config.data.vocab_size
    path, dvae = Path(arguments.init_from), arguments.get("dvae_checkpoint")
    use_checkpoint_shape(config, module, read_checkpoint(path, module.kind), path)
    if module.kind == "dalle":
        arguments.dvae_checkpoint = dvae or path
        arguments.text_vocab_size = config.data.vocab_size = vocab_size  # may be larger, for new tokens
        config.data.tokenizer_file = config.data.tokenizer_file or path


def run_lightning(argv: list[str]) -> "LightningCLI":
    """Run a subcommand of LightningCLI; the config key `model.class_path` selects the model.

    Raises:
        UserError: if a config key, a file or the combination of both is wrong; errors of Lightning's own checks too.
        SystemExit: with status 130 after Ctrl-C, and 143 after SIGTERM.
    """
    import torch
    from jsonargparse import set_parsing_settings
    from pytorch_lightning import LightningModule
    from pytorch_lightning.callbacks import BasePredictionWriter, LearningRateMonitor, ThroughputMonitor
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from pytorch_lightning.plugins.io import TorchCheckpointIO
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

    from lightning_dalle.checkpoints import check_dvae, check_resumable, load_dvae, read_checkpoint, resolve_checkpoint
    from lightning_dalle.data.datamodule import CaptionedImageDataModule
    from lightning_dalle.training.callbacks.codes_writer import CodesWriter
    from lightning_dalle.training.callbacks.loggers import run_folder
    from lightning_dalle.training.callbacks.visualization import DataSummary, batch_size

    # Optimizer moments of parameters without gradients, such as behind a dead ReLU, decay into denormals. Intel CPUs
    # multiply denormals in microcode: a step of the quickstart's dVAE took up to 2.3 times as long. The setting is made
    # here because it only affects threads that start later.
    torch.set_flush_denormal(True)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)

    class Parser(LightningArgumentParser):
        error = raise_user_error

    class RunConfig(SaveConfigCallback):
        """Config in the folder of the run; Lightning would write that of a W&B run into the current folder."""

        def setup(self, trainer: "Trainer", pl_module: LightningModule, stage: str) -> None:
            if stage != "fit":
                super().setup(trainer, pl_module, stage)

        def on_train_epoch_start(self, trainer: "Trainer", pl_module: LightningModule) -> None:
            super().setup(trainer, pl_module, "fit")  # after LastCheckpoint refused to overwrite an earlier run

        def save_config(self, trainer: "Trainer", pl_module: LightningModule, stage: str) -> None:
            if (folder := run_folder(trainer)) is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)

    class AllFormatsIO(TorchCheckpointIO):
        def __init__(self, model: str) -> None:
            self.model = model

        def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return read_checkpoint(path, self.model)

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # A config states shared values once, under `data`. A link to a field that the model lacks is ignored.
            parser.link_arguments("data.image_size", "model.init_args.config.image_size")
            parser.link_arguments("data.text_len", "model.init_args.text_len")
            parser.link_arguments("data.vocab_size", "model.init_args.text_vocab_size")

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            module, path = lit_module(config.model.class_path), config.ckpt_path
            if module is None:  # Lightning alone reads the checkpoints of other modules
                return
            if self.subcommand == "fit" and config.model.init_args.get("init_from") is not None:
                use_initial_shape(config, module)
            if path in (None, "last", "best", "hpc") or Path(path, ".metadata").is_file():  # a sharded checkpoint
                return
            file = resolve_checkpoint(path, module.kind)
            checkpoint = read_checkpoint(file, module.kind)
            if self.subcommand == "fit":
                if "optimizer_states" not in checkpoint:
                    raise UserError(
                        f"cannot resume from {file}: it has no training state (its key optimizer_states is missing); "
                        f"start a new fit from its weights with --model.init_from {path}"
                    )
                check_resumable(checkpoint, file)
            else:
                use_checkpoint_shape(config, module, checkpoint, file)
            config.ckpt_path = str(file)

        def _parse_ckpt_path(self) -> None:
            """Keep the config as it is; Lightning would import the class that a checkpoint's hyperparameters name."""

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                if isinstance(error, UserError) or "Does not validate" not in str(error):
                    raise
                # jsonargparse wraps the message of a config class in a list of the types that it tried.
                raise UserError(clean_error(str(error))) from error

        def instantiate_trainer(self, **kwargs: Any) -> "Trainer":
            config = self.config[self.subcommand]
            if config.trainer.logger is False:  # both monitors refuse to run without a logger
                self.trainer_defaults["callbacks"] = [DataSummary()]
            trainer, module = super().instantiate_trainer(**kwargs), lit_module(config.model.class_path)
            if module is not None and self.subcommand != "fit":  # a fit only reads and writes Lightning checkpoints
                trainer.strategy.checkpoint_io = AllFormatsIO(module.kind)
            return trainer

        def before_fit(self) -> None:
            dvae = getattr(self.model, "dvae_checkpoint", None)
            if dvae is not None:  # checked before the data is prepared, which may take hours
                check_dvae("the data", load_dvae(dvae), dvae, image_size=self.datamodule.image_size)

        def before_predict(self) -> None:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, CodesWriter | BasePredictionWriter) for callback in callbacks):
                raise UserError(
                    f"nothing would write what predict computes with a {type(self.model).__name__}: add CodesWriter to "
                    "trainer.callbacks for the codes of a dVAE, or sample images with the command generate"
                )

    callbacks = [LearningRateMonitor("step"), ThroughputMonitor(batch_size, window_size=10), DataSummary()]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        return CLI(
            LightningModule,
            CaptionedImageDataModule,
            subclass_mode_model=True,
            trainer_defaults={"callbacks": callbacks},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=Parser,
            parser_kwargs={"prog": "python -m lightning_dalle"},
            args=argv,
        )
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning ends such a run with status 1
            sys.exit(128 + signal.SIGINT)
        raise
    except UserError:
        raise
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith(("pytorch_lightning.", "lightning_fabric.")):
            raise
        hint = ", and remove its plugins with --trainer.plugins null" if "plugins" in str(error) else ""
        raise UserError(f"{error} (an error of Lightning: correct the config{hint})") from error
