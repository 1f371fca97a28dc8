"""`python -m lightning_dalle`: Lightning's verbs on our models and data, and our few others beside them.

Knows argv and YAML. Imports Lightning only for Lightning's verbs.
"""

import sys
from typing import TYPE_CHECKING

from lightning_dalle import commands
from lightning_dalle.errors import UserError

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI

COMMANDS = {"generate": commands.generate, "reproduce": commands.reproduce}

USAGE = """usage: python -m lightning_dalle COMMAND [options]

DALL-E (Ramesh et al. 2021) as a PyTorch Lightning experiment repo.

  reproduce   run a recipe: every stage of training, then samples and a report
  generate    draw pictures of prompts with a trained model
  fit         train one model              (Lightning's, as are those below)
  validate    validate one model
  test        test one model
  predict     run one model over the data

python -m lightning_dalle COMMAND --help tells the options of each."""


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's mistake ends in its sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    verbs = [*COMMANDS, "fit", "validate", "test", "predict"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    try:
        if argv[0] not in verbs:
            raise UserError(f"there is no command {argv[0]!r}; there are {', '.join(verbs)}")
        if argv[0] in COMMANDS:
            from jsonargparse import auto_cli

            auto_cli(COMMANDS[argv[0]], args=argv[1:], as_positional=False)
        else:
            lightning(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def lightning(argv: list[str], run: bool = True) -> "LightningCLI":
    """Parses and, if `run`, runs a verb of Lightning's: the model is chosen in YAML by class_path."""
    from jsonargparse import set_parsing_settings
    from pytorch_lightning import LightningModule
    from pytorch_lightning.callbacks import LearningRateMonitor, RichProgressBar, ThroughputMonitor
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

    from lightning_dalle.data.datamodule import CaptionedImageDataModule
    from lightning_dalle.training.callbacks import batch_size

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # A fact that two parts need is stated once. A link to a field that the chosen model lacks is passed over.
            parser.link_arguments("data.image_size", "model.init_args.config.image_size")
            parser.link_arguments("data.text_len", "model.init_args.text_len")
            parser.link_arguments("data.vocab_size", "model.init_args.text_vocab_size")

    callbacks = [RichProgressBar(), LearningRateMonitor("step"), ThroughputMonitor(batch_size, window_size=20)]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return CLI(
        LightningModule,
        CaptionedImageDataModule,
        subclass_mode_model=True,
        trainer_defaults={"callbacks": callbacks},
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=argv,
        run=run,
    )
