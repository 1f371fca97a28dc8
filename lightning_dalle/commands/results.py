"""`results`: what has been measured, as a table for people.

Knows where results are filed.
"""

import json
from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.tables import markdown, rows


def results(folder: Path = Path("evals/results")) -> None:
    """Print every result in a folder as one Markdown table; a cell is empty where a measure was not taken.

    Args:
        folder: of the JSON files that `test`, `evaluate` and `reproduce` write.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"there are no results in {folder}")
    lines: list[tuple[str, ...]] = []
    for file in files:
        try:
            lines += [(file.stem, *row) for row in rows(json.loads(file.read_text()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no result of lightning_dalle: {error!r}") from error
    print(markdown(lines))
