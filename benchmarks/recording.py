"""What every benchmark does with its figures.

Knows JSON lines. Knows nothing of what is measured.
"""

import json
from pathlib import Path
from typing import Any

from lightning_dalle.hardware import describe_hardware
from lightning_dalle.provenance import commit

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """Prints figures with the commit and the machine, and appends them to {name}.jsonl in the folder."""
    result = {**figures, "commit": commit(), "machine": describe_hardware()}
    print(json.dumps(result, indent=2))
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
