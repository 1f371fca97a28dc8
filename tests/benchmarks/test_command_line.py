"""`python -m benchmarks.NAME --help` prints the usage, and measures and records nothing."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path("benchmarks")
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if '__name__ == "__main__"' in file.read_text())


def test_every_benchmark_is_listed() -> None:
    assert {"attention", "cuda", "sampling", "start_up", "training_step"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_prints_the_usage_and_runs_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = {file: file.stat().st_mtime_ns for file in (FOLDER / "results").iterdir()}
    monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert exit_.value.code == 0
    assert f"usage: python -m benchmarks.{name} " in capsys.readouterr().out
    assert recorded == {file: file.stat().st_mtime_ns for file in (FOLDER / "results").iterdir()}
