"""`python -m lightning_dalle`: Lightning's verbs on our models and data, and our few others beside them.

Knows argv and YAML. Imports Lightning only for Lightning's verbs.
"""

import difflib
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_dalle.commands.convert import convert
from lightning_dalle.commands.data import report
from lightning_dalle.commands.evaluate import evaluate
from lightning_dalle.commands.export import export
from lightning_dalle.commands.generate import generate
from lightning_dalle.commands.overlap import overlap
from lightning_dalle.commands.plan import plan
from lightning_dalle.commands.reproduce import reproduce
from lightning_dalle.commands.results import results
from lightning_dalle.errors import UserError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.cli import LightningCLI

COMMANDS: dict[str, Callable[..., None]] = {
    "reproduce": reproduce,
    "generate": generate,
    "export": export,
    "convert": convert,
    "plan": plan,
    "evaluate": evaluate,
    "results": results,
    "data report": report,
    "data overlap": overlap,
}

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

USAGE = """usage: python -m lightning_dalle COMMAND [options]

DALL-E (Ramesh et al. 2021) as a PyTorch Lightning experiment repo.

  reproduce     run a recipe: every stage of training, then samples and a report
  generate      draw pictures of prompts with a trained model
  export        write a trained model as a folder for others: safetensors and a model card
  convert       write OpenAI's released dVAE as a file of ours, without executing it
  evaluate      score a folder of pictures against another: FID, KID, precision, recall, IS
  results       print what has been measured as a table
  plan          print what a fit of a transformer will need: memory, traffic, time
  data report   print what every filter rejects of the data, before anything is trained
  data overlap  find near-duplicates of an evaluation set in the training data
  fit           train one model              (Lightning's, as are those below)
  validate      validate one model
  test          test one model: configs/*/eval.yaml score its pictures or reconstructions
  predict       run one model over the data

python -m lightning_dalle COMMAND --help tells the options of each."""


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's mistake ends in its sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    verbs = [*COMMANDS, "fit", "validate", "test", "predict"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    words = next((n for n in (1, 2) if " ".join(argv[:n]) in verbs), 0)
    try:
        if not words:
            raise UserError(f"there is no command {argv[0]!r}; there are {', '.join(verbs)}")
        name = " ".join(argv[:words])
        if name in COMMANDS:
            command(name, argv[words:])
        else:
            check_configs(argv[words:])
            lightning(argv)
    except UserError as error:
        # One that was raised in a worker of a loader comes with the worker's traceback before the sentence.
        said = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


def check_configs(argv: list[str]) -> None:
    """Raises a UserError if a config is not there or is no YAML of keys, before Lightning is imported to read it."""
    joined = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    for config in [value for option, value in itertools.pairwise(argv) if option in ("-c", "--config")] + joined:
        import yaml

        path = Path(config)
        try:
            # What is no file may be the YAML itself.
            keys = yaml.load(path.read_text() if path.exists() else config, yaml.CSafeLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"the config {config} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(keys, dict):
            what = "holds no keys, but " + type(keys).__name__ if path.exists() else "is not there"
            raise UserError(f"the config {config} {what}")


def command(name: str, argv: list[str]) -> None:
    """Runs a function whose parameters are the options; `--config` is a file of them, if it is not one itself."""
    from jsonargparse import ArgumentParser, auto_cli

    function = COMMANDS[name]
    about: dict[str, Any] = {
        "prog": f"python -m lightning_dalle {name}",
        "description": " ".join(inspect.getdoc(function).partition("\n\n")[0].split()),  # type: ignore[union-attr]
    }

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(sentence(message, lambda: set(inspect.signature(function).parameters))) from ex

    if "config" not in inspect.signature(function).parameters:
        auto_cli(function, args=argv, as_positional=False, parser_class=Parser, **about)
        return
    parser = Parser(**about)
    parser.add_function_arguments(function, as_group=False)
    function(**parser.instantiate(parser.parse_args(argv)))


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
    from lightning_dalle.training.stand_ins import StandIns

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
    from lightning_dalle.training.callbacks import TrainingData, batch_size

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
