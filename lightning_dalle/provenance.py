"""Git commit of this package's code, which is stored with every result."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Return the git commit of this package, with "-dirty" after local changes; None without git or outside a clone.

    An installed package may lie in another repository, which does not track its files.
    """
    if shutil.which("git") is None:
        return None

    def git(*arguments: str | Path) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    if not git("ls-files", __file__):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40") or None
