"""How soon the command line answers: `--help`, and a user's mistakes, against a bare `import pytorch_lightning`.

    python -m benchmarks.start_up

Each is a process of its own, and they take turns; what is counted is the CPU time of the process and its children,
which other work on the machine disturbs less than the clock's. Prints the medians and their ratios, and appends them to
benchmarks/results/start_up.jsonl.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.recording import record

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
    """What a process took, whatever it answered."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(work: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Medians of the seconds that each took; the first round, which reads the disk, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, arguments in work.items():
            times[name].append(seconds_of_cpu(arguments))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def result(bare: str, commands: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of CPU of each command, and their share of the bare import's."""
    ours = {command: ["-m", "lightning_dalle", *command.split()] for command in commands}
    seconds = measure({bare: ["-c", bare], **ours}, rounds)
    return {
        "seconds_of_cpu": {name: round(taken, 3) for name, taken in seconds.items()},
        "of_the_bare_import": {name: round(seconds[name] / seconds[bare], 4) for name in commands},
        "rounds": rounds,
    }


def main() -> None:
    measured = result(BARE, COMMANDS, ROUNDS)
    record("start_up", measured)


if __name__ == "__main__":
    main()
