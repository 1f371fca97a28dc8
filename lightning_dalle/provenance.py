"""Git commit of this package's code, which is stored with every result."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Return the git commit of this package, with "-dirty" after local changes; None without git or outside a clone."""
    if shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None
