"""The ratios of start-up are of CPU time, and of all that a process takes."""

from benchmarks.start_up import result


def test_the_benchmark_of_start_up_measures_ratios() -> None:
    measured = result("pass", ["--help"], rounds=1)
    assert measured["seconds_of_cpu"]["--help"] > measured["seconds_of_cpu"]["pass"] > 0
    assert measured["of_the_bare_import"]["--help"] > 1
