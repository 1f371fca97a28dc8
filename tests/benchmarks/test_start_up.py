"""The ratios of start-up are of CPU time, and of all that a process takes."""

import pytest

from benchmarks.start_up import result

# An empty process ends within one tick of some machines' CPU clocks, and there counts as nothing.
ONE_SECOND = "import time\nwhile time.process_time() < 1: pass"


def test_the_benchmark_of_start_up_measures_ratios() -> None:
    measured = result(ONE_SECOND, ["--help"], rounds=1)
    seconds = measured["seconds_of_cpu"]
    assert seconds[ONE_SECOND] == pytest.approx(1, abs=0.2)
    assert measured["of_the_bare_import"]["--help"] == pytest.approx(seconds["--help"] / seconds[ONE_SECOND], abs=2e-3)
