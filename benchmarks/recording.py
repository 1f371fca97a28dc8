"""Command line and recorded results of the benchmarks."""

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_dalle.hardware import describe_hardware
from lightning_dalle.provenance import commit

RESULTS = Path(__file__).parent / "results"


def run(main: Callable[..., None]) -> None:
    """Parse the command line into the parameters of `main` and call it; `--help` prints the module's docstring."""
    from jsonargparse import ArgumentParser

    module = sys.modules[main.__module__]
    spec = getattr(module, "__spec__", None)
    parser = ArgumentParser(
        prog=f"python -m {spec.name if spec else main.__module__}",
        description=inspect.getdoc(module),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_function_arguments(main, as_group=False)
    main(**parser.instantiate(parser.parse_args()))


def record(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print figures with commit and hardware, and append them to {name}.jsonl in the folder."""
    result = {**figures, "commit": commit(), "machine": describe_hardware()}
    print(json.dumps(result, indent=2))
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
