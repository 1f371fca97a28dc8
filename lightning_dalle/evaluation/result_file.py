"""JSON files of results: figures with everything they depend on."""

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
        folder: folder of the file, made if it does not exist.
        name: end of the file name, after the date and time.
        result: kind, protocol and figures.
        begun: time at which the evaluation started.
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
