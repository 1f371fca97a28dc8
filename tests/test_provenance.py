"""The commit stored with results is that of this package, not of the repository that it is installed in."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_dalle import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_is_none_inside_a_foreign_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "venv" / "site-packages" / "lightning_dalle" / "provenance.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, installed)
    (tmp_path / "script.py").touch()
    git(tmp_path, "init")
    git(tmp_path, "add", "script.py")
    git(tmp_path, "commit", "-m", "script")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.commit() is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "clone")
    assert provenance.commit() == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "script.py").write_text("changed")
    assert provenance.commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"


def test_commit_is_none_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit() is None
