"""`results`: print recorded results as a table."""

from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.results_table import markdown_table, read_result


def results(folder: Path = Path("evals/results")) -> None:
    """Print all results in a folder as one Markdown table, with warnings below it; unmeasured cells are empty.

    Args:
        folder: folder of the JSON files that `test`, `evaluate` and `reproduce` write.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"there are no results (*.json) in {folder}; choose another --folder")
    print(markdown_table({file.stem: read_result(file) for file in files}))
