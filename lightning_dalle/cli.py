"""`python -m lightning_dalle`: Lightning's verbs on our models and data, and our few others beside them.

Knows argv and YAML. Imports Lightning only for Lightning's verbs.
"""

import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
from lightning_dalle.files import read_yaml
from lightning_dalle.lightning_cli import lightning, sentence

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
        if Path(config).exists() or ":" not in config:  # else it may be the YAML itself
            read_yaml(Path(config))


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
