"""Git commit of the code, which is recorded with every result."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Return the git commit of this code, with "-dirty" if there are local changes; None outside a clone."""
    if shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None
