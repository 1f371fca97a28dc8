"""Command line of `python -m lightning_dalle`: this package's commands and the subcommands of LightningCLI."""

import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_dalle.commands.convert import convert
from lightning_dalle.commands.data import report
from lightning_dalle.commands.evaluate import evaluate
from lightning_dalle.commands.export import export
from lightning_dalle.commands.generate import generate
from lightning_dalle.commands.overlap import overlap
from lightning_dalle.commands.plan import plan
from lightning_dalle.commands.reproduce import reproduce
from lightning_dalle.commands.results import results
from lightning_dalle.errors import UserError, missing_extra
from lightning_dalle.files import read_yaml
from lightning_dalle.lightning_cli import raise_user_error, run_lightning

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

SUMMARIES = {
    "reproduce": "train the dVAE, DALL-E and CLIP of a config in turn, then write samples and a report",
    "generate": "sample images for prompts from a trained model",
    "export": "write a trained model to a folder as safetensors files with a model card, to share it",
    "convert": "convert OpenAI's dVAE from pickle to safetensors, without running code from the files",
    "evaluate": "compute FID, KID, precision, recall and Inception Score of a folder of images",
    "results": "print the result files of a folder as a Markdown table",
    "plan": "estimate the memory, communication and time of training a transformer",
    "data report": "count the training records that each filter rejects, without training",
    "data overlap": "find near-duplicates of an evaluation set in the training data",
    "fit": "train one model with the Lightning Trainer",
    "validate": "compute the validation losses of a trained model",
    "test": "evaluate the samples or reconstructions of a trained model, with a configs/*/eval.yaml",
    "predict": "encode the images of a dataset to codes with a trained dVAE",
}
"""Description of each command in `--help`; commands that `COMMANDS` lacks are subcommands of LightningCLI."""

HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> None:
    """Run the command that `argv` names; on a UserError, print its message and exit with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    groups = {name.split()[0] for name in SUMMARIES if " " in name}
    if not argv or argv[0] in HELP:
        return print(usage(""))
    if argv[0] in groups and (len(argv) == 1 or argv[1] in HELP):
        return print(usage(argv[0] + " "))
    words = 2 if argv[0] in groups else 1
    name, options = " ".join(argv[:words]), argv[words:]
    try:
        if name in COMMANDS:
            run_command(name, options)
        elif name in SUMMARIES:
            check_configs(options)
            run_lightning(argv)
        else:
            choices = [choice for choice in SUMMARIES if words == 1 or choice.startswith(argv[0] + " ")]
            raise UserError(f"unknown command {name!r}; choose from {', '.join(choices)}")
    except (UserError, ModuleNotFoundError) as error:
        message = missing_extra(error) if isinstance(error, ModuleNotFoundError) else str(error)
        if message is None:
            raise
        # An error raised in a DataLoader worker carries the worker's traceback in front of its message.
        message = message.rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def usage(group: str) -> str:
    """Return the usage text that lists the commands whose names start with `group`."""
    lines = [f"  {name:<14}{text}" for name, text in SUMMARIES.items() if name.startswith(group)]
    return "\n".join(
        [
            f"usage: python -m lightning_dalle {group}COMMAND [options]\n",
            "DALL-E (Ramesh et al. 2021) in PyTorch Lightning.\n",
            *lines,
            f"\npython -m lightning_dalle {group}COMMAND --help lists the options of a command.",
        ]
    )


def check_configs(argv: list[str]) -> None:
    """Raise a UserError if a `--config` file cannot be read, before the imports of Lightning take seconds."""
    joined = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    for config in [value for option, value in itertools.pairwise(argv) if option in ("-c", "--config")] + joined:
        if Path(config).exists() or ":" not in config:  # text with a colon may be inline YAML
            read_yaml(Path(config))


def run_command(name: str, argv: list[str]) -> None:
    """Run a command's function with parameters that are parsed from `argv` or from the YAML file of its `--config`."""
    from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    function = COMMANDS[name]
    about: dict[str, Any] = {
        "prog": f"python -m lightning_dalle {name}",
        "description": " ".join(inspect.getdoc(function).partition("\n\n")[0].split()),  # type: ignore[union-attr]
    }

    class Parser(ArgumentParser):
        error = raise_user_error

    if "config" not in inspect.signature(function).parameters:
        auto_cli(function, args=argv, as_positional=False, parser_class=Parser, **about)
        return
    parser = Parser(**about)
    parser.add_function_arguments(function, as_group=False)
    function(**parser.instantiate(parser.parse_args(argv)))
