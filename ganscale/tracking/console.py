"""Progress on the terminal, read from the run's own files.

The process that starts a run follows metrics.jsonl and events.jsonl. So the same lines appear
whether the workers are this process, processes of Ray on this machine, or on another machine that
shares storage, and nothing in training knows of a terminal.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from ganscale.json_lines import end_of_lines, parse_lines
from ganscale.periodic import PeriodicThread
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import WRONG

__all__ = ["RunFollower", "counting", "progress_bars", "stderr_console"]

_POLL_SECONDS = 0.3
_LINE_SECONDS = 25.0
"""Between two lines about a task where there is no terminal: at least one every half minute.

Longer silence would look like a hang in the log of a scheduler or of a CI system.
"""


class RunFollower(PeriodicThread):
    """Shows a run's progress while the block runs: a bar on a terminal, else plain lines."""

    def __init__(self, run_dir: RunDirectory, total_nimg: int, console: Console) -> None:
        super().__init__("console", _POLL_SECONDS)
        self._total = total_nimg
        self._console = console
        # Made here and not in the thread: what the files hold now is an earlier session's.
        self._tails = [_Tail(run_dir.events), _Tail(run_dir.metrics)]
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total_nimg, status="")

    def _begin(self) -> None:
        self._progress.start()

    def _finish(self) -> None:
        self._progress.stop()

    def _run(self) -> None:
        super()._run()
        self._tick()  # the last rows, written since the last look

    def _tick(self) -> None:
        events, metrics = self._tails
        # Events first: a start comes before the rows that follow from it.
        for event in events.new_rows():
            self._show_event(event)
        for row in metrics.new_rows():
            self._show_row(row)

    def _show_event(self, event: dict[str, Any]) -> None:
        text = describe_event(event)
        if text is not None:
            style = "yellow" if event["event"] in WRONG else None
            self._console.print(text, highlight=False, soft_wrap=True, style=style)
        busy = {"fault": "restarting", "waiting": "waiting for room", "regroup": "regrouping"}
        doing = busy.get(event["event"], "training")
        self._progress.update(self._task, description=doing)

    def _show_row(self, row: dict[str, Any]) -> None:
        status = describe_row(row, self._total)
        self._progress.update(self._task, completed=row["nimg"], status=status)
        if not self._console.is_terminal:
            done = f"{row['nimg'] / 1000:9.1f}/{self._total / 1000:g} kimg"
            self._console.print(f"{done}  {status}", highlight=False, soft_wrap=True)


def describe_event(event: dict[str, Any]) -> str | None:
    """An event in a few words; None for one that is not shown, such as a checkpoint."""
    kind, kimg, message = event["event"], event.get("nimg", 0) / 1000, event.get("message", "")
    if kind in ("start", "resume", "rollback"):
        return (
            f"{kind} at {kimg:g} kimg: {event['world_size']} worker(s), {event['device']}, "
            f"{event['precision']}, W&B {event['wandb']}"
        )
    if kind == "stall":
        ranks = ", ".join(str(rank) for rank in event["ranks"])
        return (
            f"step {event['step']} has taken {event['seconds']:.0f} s; it waits for rank {ranks} "
            f"(stacks in {event['stacks']})"
        )
    if kind == "waiting":
        return f"waiting for {event['min_workers']} worker(s): {message}"
    if kind == "regroup":
        return f"room for {event['room']} more: {event['num_workers']} worker(s) make way"
    if kind == "alarm":
        return f"at {kimg:g} kimg {message} ({event['kind']}: {event['action']})"
    if kind == "checkpoint_failed":
        return f"the checkpoint at {kimg:g} kimg could not be written: {message}"
    texts = {"fault": f"fault: {message}", "group_lost": f"starting anew: {message}"}
    return {**texts, "wandb": message}.get(kind)


def describe_row(row: dict[str, Any], total_nimg: int) -> str:
    """A row of metrics in a few words."""
    speed = row["time/images_per_second"]
    left = timedelta(seconds=round((total_nimg - row["nimg"]) / speed)) if speed else "?"
    words = [f"{speed:6.0f} img/s", f"ETA {left}"]
    for name in (name for name in row if re.fullmatch(r"train/loss_[A-Z]", name)):
        value = row[name]
        shown = "not finite" if value is None else f"{value:6.3f}"
        words.append(f"{name.removeprefix('train/')} {shown}")
    words.append(f"scale {_each(row, 'train/loss_scale_')}")
    skips = _each(row, "train/skips_")
    return "  ".join([*words, f"skips {skips}"] if skips.strip("0/") else words)


def _each(row: dict[str, Any], prefix: str) -> str:
    """The values of all networks."""
    return "/".join(f"{row[name]:g}" for name in sorted(row) if name.startswith(prefix))


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
        with self._lock:
            self._task = task
        self._print(description if total is None else f"{description} ({total})")
        return task.advance

    def _tick(self) -> None:
        with self._lock:
            task = self._task
        if task is not None:
            self._print(task.describe())

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Task:
    """A task that a `_LineReporter` shows."""

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
    progress = Progress(console=console)

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
    """The console for messages and progress; results go to standard output."""
    return Console(file=sys.stderr)


class _Tail:
    """Complete new lines of a file that grows, from where it ended when the follower was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = end_of_lines(path)

    def new_rows(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        # A line that is just being written is left for the next look.
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return parse_lines(complete)
