"""`results`: what has been measured, as a table for people.

Knows where results are filed.
"""

import json
from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.results_table import cautions, markdown, rows


def results(folder: Path = Path("evals/results")) -> None:
    """Print every result in a folder as one Markdown table, and below it what is to be known of the figures; a cell is
    empty where a measure was not taken.

    Args:
        folder: of the JSON files that `test`, `evaluate` and `reproduce` write.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"there are no results in {folder}")
    lines: list[tuple[str, ...]] = []
    told: list[str] = []
    for file in files:
        try:
            result = json.loads(file.read_text())
            lines += [(file.stem, *row) for row in rows(result)]
            told += [f"{file.stem}: {caution}" for caution in cautions(result)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no result of lightning_dalle: {error!r}") from error
    print(markdown(lines, told))
