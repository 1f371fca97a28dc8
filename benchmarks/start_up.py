"""Start-up time of the command line (`--help` and mistakes) relative to a bare `import pytorch_lightning`.

    python -m benchmarks.start_up

Every command runs in its own process; the commands take turns. The benchmark counts CPU time of the process and its
children, because other work on the machine disturbs it less than wall-clock time. It prints the medians and their
ratios, and appends them to benchmarks/results/start_up.jsonl.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.recording import record, run

BARE = "import pytorch_lightning"
COMMANDS = (
    "--help",
    "generate --help",
    "gnerate",
    "generate --chekpoint x",
    "reproduce --prompt 1",
    "evaluate --image x",
    "fit --config nowhere.yaml",
)
ROUNDS = 5


def seconds_of_cpu(arguments: Sequence[str]) -> float:
    """Return the CPU seconds of a process, whether it succeeds or fails."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(work: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each command; the first round only warms the disk cache."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, arguments in work.items():
            times[name].append(seconds_of_cpu(arguments))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def result(bare: str, commands: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of each command, and their ratio to the bare import."""
    ours = {command: ["-m", "lightning_dalle", *command.split()] for command in commands}
    seconds = measure({bare: ["-c", bare], **ours}, rounds)
    return {
        "seconds_of_cpu": {name: round(taken, 3) for name, taken in seconds.items()},
        "of_the_bare_import": {name: round(seconds[name] / seconds[bare], 4) for name in commands},
        "rounds": rounds,
    }


def main(rounds: int = ROUNDS) -> None:
    """Measure start-up.

    Args:
        rounds: number of counted rounds.
    """
    record("start_up", result(BARE, COMMANDS, rounds))


if __name__ == "__main__":
    run(main)
