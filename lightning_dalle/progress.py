"""Progress bars of long commands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress, TimeElapsedColumn

OnProgress = Callable[[int, int], None]
"""Called with the number of items done and the total."""


def no_progress(done: int, total: int) -> None:
    """Show nothing; the default of functions that report progress."""


@contextmanager
def progress_bar(description: str) -> Iterator[OnProgress]:
    """Show a progress bar with the time elapsed and remaining; yields the function that updates it."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
