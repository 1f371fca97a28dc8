"""JSON files of evaluation results, with settings, commit and hardware."""

import json
import time
from pathlib import Path
from typing import Any

from lightning_dalle.files import write_json
from lightning_dalle.hardware import describe_hardware
from lightning_dalle.provenance import commit
from lightning_dalle.results_table import FORMAT, markdown_table


def write_result(folder: Path, name: str, result: dict[str, Any], begun: float) -> None:
    """Write a result with its format, commit, hardware and duration, and print it as a table.

    Args:
        folder: folder for the file, which is created if it does not exist.
        name: second part of the file name, after the date and time.
        result: dictionary with the kind of evaluation, its protocol and figures.
        begun: start of the evaluation, as returned by `time.time()`.
    """
    result = {
        "format": FORMAT,
        **result,
        "commit": commit(),
        "machine": describe_hardware(),
        "seconds": round(time.time() - begun, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{time.strftime('%Y-%m-%d_%H%M%S')}_{name}.json"
    write_json(file, result)
    print(markdown_table({file.stem: result}))
    print(f"protocol: {json.dumps(result['protocol'], default=str)}\nwritten to {file}")
