"""Every notebook runs from start to end on a small real run, and is committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted([*Path("notebooks").glob("*.ipynb"), *Path("evals").glob("*.ipynb")])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_notebook_runs(
    path: Path, tiny_run: dict[str, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("RUN_DIR", str(tiny_run["dvae"].parent))
    if path.name.startswith(("2", "3")):  # only these need photos that are not the project's
        monkeypatch.setenv("RESULTS_DIR", str(request.getfixturevalue("sweep_run") / "results"))
    monkeypatch.setenv("PROMPTS", "24")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
