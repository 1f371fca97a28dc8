"""Progress bar of commands that take long, and the callback that updates it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress, TimeElapsedColumn

OnProgress = Callable[[int, int], None]
"""Callback that a long function calls with the number of items done and the total number."""


def no_progress(done: int, total: int) -> None:
    """Skip progress reports; this is the default of functions that take an `OnProgress`."""


@contextmanager
def progress_bar(description: str) -> Iterator[OnProgress]:
    """Show a progress bar with elapsed and remaining time, and yield the function that updates it."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
