"""The console, and progress bars for long work: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, TextColumn

from ganscale.periodic import PeriodicThread

_LINE_SECONDS = 25.0
"""Between two lines about a task where there is no terminal: at least one every half minute.

Longer silence would look like a hang in the log of a scheduler or of a CI system.
"""


class _LineReporter(PeriodicThread):
    """Shows tasks without a terminal: a line at the start of each, and one at least every 30 s.

    The lines come from a thread, so that they also come during a task that reports no progress for
    minutes, such as one slow file.
    """

    def __init__(self, console: Console) -> None:
        super().__init__("progress", _LINE_SECONDS)
        self._console = console
        self._lock = threading.Lock()
        self._task: _Task | None = None

    def start_task(self, description: str, total: int | None) -> Callable[[int], None]:
        """Report another task from now on; returns a function that takes how many more are done."""
        task = _Task(description, total)
        # Printed first, so that the thread's lines about the task come after it.
        self._print(description if total is None else f"{description} ({total})")
        with self._lock:
            self._task = task
        return task.advance

    def _tick(self) -> None:
        with self._lock:
            task = self._task
        if task is not None:
            self._print(task.describe())

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


class _Task:
    def __init__(self, description: str, total: int | None) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._began = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count

    def describe(self) -> str:
        """How far the task is, and for how long it has run."""
        elapsed = timedelta(seconds=round(time.monotonic() - self._began))
        if self._total is None:
            return f"{self._description}: {self._done} done after {elapsed}"
        share = self._done / max(1, self._total)
        return f"{self._description}: {self._done} of {self._total} ({share:.0%}) after {elapsed}"


@contextmanager
def counting(
    description: str, total: int | None, console: Console
) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` things; yields a function that takes how many more are done."""
    with progress_bars(console) as start_task:
        yield start_task(description, total)


@contextmanager
def progress_bars(
    console: Console | None,
) -> Iterator[Callable[[str, int | None], Callable[[int], None]]]:
    """A progress bar for each part of long work, one after the other; none without a console.

    Where the console is not a terminal, lines appear instead: one for each part, and one at least
    every half minute. Yields a function that starts a part, given its description and its number
    of things if that is known, and returns a function that takes how many more are done.
    """
    if console is None:
        yield lambda description, total: lambda count: None
        return
    if not console.is_terminal:
        with _LineReporter(console) as reporter:
            yield reporter.start_task
        return
    # rich's own column of descriptions has markup and emoji whatever the console's settings are.
    description_column = TextColumn("{task.description}", "progress.description", markup=False)
    progress = Progress(description_column, *Progress.get_default_columns()[1:], console=console)

    def start_task(description: str, total: int | None) -> Callable[[int], None]:
        # Parts follow each other, so earlier ones are done; one without a total would go on
        # spinning.
        for earlier in progress.tasks:
            progress.update(earlier.id, total=earlier.total or 1, completed=earlier.total or 1)
        task = progress.add_task(description, total=total)
        return lambda count: progress.advance(task, count)

    with progress:
        yield start_task


def stderr_console() -> Console:
    """The console for messages and progress; results go to standard output.

    Without markup, as all consoles here: rich would take [brackets] in a path or in an error's text
    for its own, leave them out, or raise `MarkupError`. Without emoji, as it would make one of the
    `:100:` in `loader.py:100: no such file`.
    """
    return Console(file=sys.stderr, markup=False, emoji=False)
