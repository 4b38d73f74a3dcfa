"""A run on the terminal, read from the run's own files.

The process that starts a run follows its metrics.jsonl and events.jsonl, and `ganscale watch` does
the same from anywhere. So a run looks the same whether its workers are this process, processes of
Ray on this machine, or on another machine that shares storage, and nothing in training knows of a
terminal. On a terminal there is one view that changes in place; elsewhere a line now and then.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ganscale.json_lines import end_of_lines, parse_lines
from ganscale.periodic import PeriodicThread
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import WRONG

_POLL_SECONDS = 0.3
_LINE_SECONDS = 30.0
_LINE_SHARE = 0.05
"""Between two lines where there is no terminal: so many seconds, or such a part of the run."""
_MAX_MESSAGES = 5
_ENDS = {"end": "finished", "stop": "stopped"}
_STATES = {"fault": "restarting", "waiting": "waiting for room", "regroup": "changing workers"}


@dataclass
class RunStatus:
    """What is known of a run: its newest row, what was measured last, and what went wrong."""

    name: str
    total_nimg: int
    state: str = "starting"
    """starting, training, restarting, waiting for room, changing workers, stopped, finished."""
    start: Mapping[str, Any] = field(default_factory=dict)
    """The event that began the newest attempt."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The newest row."""
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    """What was measured last, and where: metric to (value, nimg)."""
    best: dict[str, float] = field(default_factory=dict)
    """The lowest value of each Frechet distance."""
    checkpoint: Mapping[str, Any] | None = None
    """The event of the newest checkpoint."""
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    """Events of what went wrong, the newest last."""

    def take_event(self, event: Mapping[str, Any]) -> None:
        """Take in a line of events.jsonl."""
        kind = event["event"]
        if kind in ("start", "resume", "rollback"):
            self.start, self.state = event, "training"
        elif kind in _ENDS:
            self.state = _ENDS[kind]
        elif kind in _STATES:
            self.state = _STATES[kind]
        elif kind == "checkpoint":
            self.checkpoint = event
        if kind in WRONG:
            self.messages = [*self.messages, event][-_MAX_MESSAGES:]

    def take_row(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Take in a line of metrics.jsonl; returns what was measured in it."""
        self.row = row
        if self.state not in _ENDS.values():
            self.state = "training"
        measured = {
            name.removeprefix("metrics/"): value
            for name, value in row.items()
            if name.startswith("metrics/") and value is not None
        }
        for name, value in measured.items():
            self.metrics[name] = (value, row["nimg"])
            if name.startswith(("fid", "fd_")):
                self.best[name] = min(value, self.best.get(name, math.inf))
        return measured

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, or was stopped."""
        return self.state in _ENDS.values()

    @property
    def seconds_left(self) -> float | None:
        """At the newest row's speed; None before the first row."""
        speed = self.row.get("time/images_per_second")
        return (self.total_nimg - self.row["nimg"]) / speed if speed else None


class RunFollower(PeriodicThread):
    """Shows a run while the block runs: a live view on a terminal, else lines.

    Args:
        run_dir: of the run.
        total_nimg: its length in images.
        console: where it is shown.
        from_start: whether what the files hold already is shown as well.
    """

    def __init__(
        self, run_dir: RunDirectory, total_nimg: int, console: Console, *, from_start: bool = False
    ) -> None:
        super().__init__("console", _POLL_SECONDS)
        self.status = RunStatus(run_dir.name, total_nimg)
        self._console = console
        # Made here and not in the thread: what the files hold now is an earlier session's.
        self._tails = [_Tail(p, from_start=from_start) for p in (run_dir.events, run_dir.metrics)]
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, get_renderable=self._view, refresh_per_second=4)
        self._lines = _Lines(total_nimg)
        if from_start:  # history in one go, without a line for each event of it
            self._take_new(shown=False)

    def _begin(self) -> None:
        if self._live is not None:
            self._live.start()

    def _finish(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _run(self) -> None:
        super()._run()
        self._tick()  # the last rows, written since the last look

    def _tick(self) -> None:
        self._take_new(shown=True)

    def _take_new(self, *, shown: bool) -> None:
        events, metrics = self._tails
        # Events first: a start comes before the rows that follow from it.
        for event in events.new_rows():
            self.status.take_event(event)
            if shown:
                self._show_event(event)
        for row in metrics.new_rows():
            measured = self.status.take_row(row)
            if shown and self._live is None and self._lines.is_due(row, measured):
                text = describe_row(self.status, measured)
                self._console.print(text, highlight=False, soft_wrap=True)

    def _show_event(self, event: Mapping[str, Any]) -> None:
        if self._live is not None:
            return  # the view says so
        text = describe_event(event)
        if text is not None:
            style = "yellow" if event["event"] in WRONG else None
            self._console.print(text, highlight=False, soft_wrap=True, style=style)

    def _view(self) -> RenderableType:
        return view(self.status, now=time.time())


class _Lines:
    """Which rows become lines: all with measurements, and one in each interval."""

    def __init__(self, total_nimg: int) -> None:
        self._total = total_nimg
        self._shown_at = -math.inf
        self._shown_nimg = -math.inf

    def is_due(self, row: Mapping[str, Any], measured: Mapping[str, float]) -> bool:
        now, nimg = time.monotonic(), row["nimg"]
        is_due = (
            now - self._shown_at >= _LINE_SECONDS
            or nimg - self._shown_nimg >= _LINE_SHARE * self._total
            or nimg >= self._total
            or measured.keys() - {"diversity"}
        )
        if is_due:
            self._shown_at, self._shown_nimg = now, nimg
        return bool(is_due)


def view(status: RunStatus, *, now: float) -> RenderableType:
    """The live view: what the run is, how far it is, how fast, its losses, and what went wrong.

    `now` is in seconds since 1970.
    """
    parts: list[RenderableType] = [_heading(status)]
    nimg = status.row.get("nimg", status.start.get("nimg", 0))
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    done = f"{nimg / status.total_nimg:.0%}  {nimg / 1000:g} of {status.total_nimg / 1000:g} kimg"
    bar.add_row(ProgressBar(total=status.total_nimg, completed=nimg), done + _left(status))
    parts.append(bar)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, text in _facts(status, now):
        facts.add_row(name, text)
    for event in status.messages:
        if (problem := describe_event(event)) is not None:
            facts.add_row("problem", Text(problem, style="yellow"))
    parts.append(facts)
    return Group(*parts)


def _heading(status: RunStatus) -> Text:
    style = "green" if status.state in ("training", "finished") else "yellow"
    text = Text.assemble((status.name, "bold"), "  ", (status.state, style))
    if status.start:
        text.append(f"  {_workers(status.start)}")
    return text


def _facts(status: RunStatus, now: float) -> list[tuple[str, str]]:
    row, facts = status.row, []
    if speed := row.get("time/images_per_second"):
        facts.append(("speed", f"{speed:.0f} images/s{_shares(row)}"))
    if losses := _losses(row):
        facts.append(("losses", losses))
    if status.metrics:
        shown = [
            f"{name} {value:.4g} at {nimg / 1000:g} kimg{_best(status, name, value)}"
            for name, (value, nimg) in status.metrics.items()
        ]
        facts.append(("metrics", "\n".join(shown)))
    if status.checkpoint is not None:
        age = timedelta(seconds=max(0, round(now - status.checkpoint["time"])))
        facts.append(("checkpoint", f"{status.checkpoint['nimg'] / 1000:g} kimg, {age} ago"))
    if row and not status.is_over and "time/unix" in row and now - row["time/unix"] > 120:
        age = timedelta(seconds=round(now - row["time/unix"]))
        facts.append(("last row", f"{age} ago"))
    return facts


def _shares(row: Mapping[str, Any]) -> str:
    """Where a step's time goes: the parts that take at least a hundredth of it."""
    found = re.compile(r"time/(\w+)_seconds")
    parts = {match[1]: row[match[0]] or 0.0 for name in row if (match := found.fullmatch(name))}
    parts.pop("evaluation", None)  # its seconds are a whole, not those of a step
    total = sum(parts.values())
    words = [
        f"{name.removesuffix('_wait').replace('_', ' ')} {seconds / total:.0%}"
        for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
        if total and seconds >= 0.01 * total
    ]
    return f", {1000 * total:.0f} ms a step ({', '.join(words)})" if words else ""


def _best(status: RunStatus, name: str, value: float) -> str:
    best = status.best.get(name)
    return f" (best {best:.4g})" if best is not None and best < value else ""


def _left(status: RunStatus) -> str:
    left = status.seconds_left
    return f"  {timedelta(seconds=round(left))} left" if left and not status.is_over else ""


def _losses(row: Mapping[str, Any]) -> str:
    words = []
    for name in (name for name in row if re.fullmatch(r"train/loss_[A-Z]", name)):
        value = row[name]
        shown = "not finite" if value is None else f"{value:.3f}"
        words.append(f"{name[-1]} {shown}")
    # A classifier that is trained on its labels alone has no other loss.
    if (value := row.get("train/cross_entropy")) is not None:
        words.append(f"cross-entropy {value:.3f}")
    scales = _each(row, "train/loss_scale_")
    if scales.strip("1/"):  # 1 without fp16
        words.append(f"scale {scales}")
    skips = _each(row, "train/skips_")
    return "  ".join([*words, f"skips {skips}"] if skips.strip("0/") else words)


def _workers(start: Mapping[str, Any]) -> str:
    num = start["world_size"]
    workers = "1 worker" if num == 1 else f"{num} workers"
    return f"{workers}, {start['device']}, {start['precision']}, W&B {start['wandb']}"


def describe_row(status: RunStatus, measured: Mapping[str, float]) -> str:
    """The newest row in a line, with what was measured in it."""
    row = status.row
    words = [f"{row['nimg'] / 1000:g} of {status.total_nimg / 1000:g} kimg"]
    words.append(f"{row['nimg'] / status.total_nimg:.0%}")
    if speed := row.get("time/images_per_second"):
        words.append(f"{speed:.0f} images/s")
    if left := _left(status):
        words.append(left.strip())
    words.append(f"loss {_losses(row)}")
    words += [f"{name} {value:.4g}" for name, value in measured.items()]
    return "  ".join(words)


def describe_event(event: Mapping[str, Any]) -> str | None:
    """An event in a few words; None for one that is not shown, such as a checkpoint."""
    kind, kimg, message = event["event"], event.get("nimg", 0) / 1000, event.get("message", "")
    if kind in ("start", "resume", "rollback"):
        return f"{kind} at {kimg:g} kimg: {_workers(event)}"
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
    if kind == "evaluation_failed":
        return f"the generator at {kimg:g} kimg could not be measured: {message}"
    texts = {"fault": f"fault: {message}", "group_lost": f"starting anew: {message}"}
    return {**texts, "wandb": message}.get(kind)


def _each(row: Mapping[str, Any], prefix: str) -> str:
    """The values of all networks."""
    return "/".join(f"{row[name]:g}" for name in sorted(row) if name.startswith(prefix))


class _Tail:
    """Complete new lines of a file that grows, from where it ended when the follower was made."""

    def __init__(self, path: Path, *, from_start: bool) -> None:
        self._path = path
        self._offset = 0 if from_start else end_of_lines(path)

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
