"""What happened to a run, when, as lanes over time and as a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ganscale.report.curves import Point
from ganscale.report.runs import Run
from ganscale.report.text import clock, counted, duration, kimg
from ganscale.tracking.history import BEGINNINGS, Row
from ganscale.tracking.live_view import describe_event
from ganscale.tracking.sinks import WRONG

_MAX_POINTS = 400
_MAX_LISTED = 200
_UNITS = ((2 * 86400, 86400.0, "d"), (2 * 3600, 3600.0, "h"), (120, 60.0, "min"), (0, 1.0, "s"))


@dataclass(frozen=True)
class Segment:
    """A stretch of training, as points (time, kimg)."""

    points: list[Point]
    is_lost: bool
    """Whether a later attempt began before it, so that it is no longer part of the run."""


@dataclass(frozen=True)
class Lane:
    """One kind of happening over time: bars (start, end, label) or marks."""

    name: str
    bars: tuple[tuple[float, float, str], ...] = ()
    marks: tuple[float, ...] = ()
    is_bad: bool = False


@dataclass(frozen=True)
class Timeline:
    """Times are counted from the first event, in `unit`."""

    segments: list[Segment]
    lanes: list[Lane]
    end: float
    unit: str


@dataclass(frozen=True)
class Happening:
    """A line of the list."""

    time: str
    position: str
    kind: str
    text: str
    is_bad: bool


def timeline_of(run: Run) -> Timeline | None:
    """The timeline of a run; None if no attempt has begun."""
    if not run.attempts:
        return None
    begin = min(float(attempt.begin["time"]) for attempt in run.attempts)
    end = max(attempt.end_time for attempt in run.attempts)
    length = max(end - begin, 1.0)
    seconds, unit = next((s, name) for least, s, name in _UNITS if length >= least)

    def at(time: float) -> float:
        return min(max(0.0, time - begin), length) / seconds

    workers = tuple(
        (at(a.begin["time"]), at(a.end_time), str(a.begin.get("world_size", "")))
        for a in run.attempts
    )
    lanes = [Lane("workers", bars=_labelled_on_change(workers))]
    for name, kinds, is_bad in (
        ("starts", BEGINNINGS, False),
        ("checkpoints", ("checkpoint",), False),
        ("evaluations", ("evaluation",), False),
        ("faults", (*WRONG, "skip"), True),
    ):
        events = [event for event in run.of_kind(*kinds) if "protocol" not in event]
        if events or name in ("checkpoints", "faults"):
            marks = tuple(_few([at(event["time"]) for event in events]))
            lanes.append(Lane(name, marks=marks, is_bad=is_bad))
    return Timeline(_segments(run, at), lanes, length / seconds, unit)


def happenings(run: Run) -> tuple[list[Happening], int]:
    """What happened, oldest first, without checkpoints; and how many were left out of the middle.

    Samples that were skipped over and over are one line.
    """
    events = [event for event in run.events if event["event"] != "checkpoint"]
    lines = [
        _happening(list(same))
        for _, same in groupby(events, key=lambda e: e["event"] if e["event"] == "skip" else id(e))
    ]
    left_out = max(0, len(lines) - _MAX_LISTED)
    half = _MAX_LISTED // 2
    return (lines[:half] + lines[-half:] if left_out else lines), left_out


def _segments(run: Run, at: Callable[[float], float]) -> list[Segment]:
    effective = {id(row) for row in run.history.rows}
    segments = []
    for attempt in run.attempts:
        # Where it began, so that an attempt without a row shows, too.
        begin = (at(attempt.begin["time"]), attempt.begin["nimg"] / 1000)
        rows = [
            row
            for row in run.rows
            if row["attempt"] == attempt.number and "step" in row and "time/unix" in row
        ]
        is_lost, points = False, [begin]
        for lost, stretch in groupby(rows, key=lambda row: id(row) not in effective):
            more = [(at(row["time/unix"]), row["nimg"] / 1000) for row in stretch]
            if lost != is_lost:
                segments.append(Segment(_few(points), is_lost))
                # From the last point on, so that the line has no gap.
                is_lost, points = lost, points[-1:]
            points += more
        segments.append(Segment(_few(points), is_lost))
    return [segment for segment in segments if len(segment.points) > 1]


def _labelled_on_change(
    bars: Sequence[tuple[float, float, str]],
) -> tuple[tuple[float, float, str], ...]:
    """Each attempt's bar; the number of workers stands where it differs from the one before."""
    before = ""
    labelled = []
    for start, end, label in bars:
        labelled.append((start, end, label if label != before else ""))
        before = label
    return tuple(labelled)


def _few(points: list[Any]) -> list[Any]:
    """Points that are too many to be told apart are thinned evenly; the last one stays."""
    step = -(-len(points) // _MAX_POINTS) or 1
    return points[:-1:step] + points[-1:]


def _happening(events: Sequence[Row]) -> Happening:
    event = events[-1]
    kind = str(event["event"])
    text = _text(event)
    if kind == "skip":
        count = sum(int(e.get("num_skipped", 0)) for e in events)
        samples = event.get("samples") or [""]
        text = f"{counted(count, 'damaged sample')} left out, such as: {samples[0]}"
    return Happening(
        clock(event["time"]),
        kimg(event["nimg"]) if "nimg" in event else "",
        kind.replace("_", " "),
        text,
        kind in (*WRONG, "skip", "rollback"),
    )


def _text(event: Row) -> str:
    kind = event["event"]
    if kind == "evaluation":
        return _metrics(event)
    if kind == "stop":
        return f"stopped: {event.get('reason', '')}"
    if kind == "end":
        return "the run has reached its length"
    if kind == "copy":
        return f"took over the weights of {event.get('source', 'another trial')}"
    # Events of other versions may lack what the description needs.
    with suppress(KeyError, TypeError, ValueError):
        text = describe_event(dict(event))
        if text is not None:
            return text
    return str(event.get("message", ""))


def _metrics(event: Row) -> str:
    metrics = event.get("metrics")
    if not isinstance(metrics, dict):
        return "metrics were added to the row at this position"
    return ", ".join(
        f"{name} {value['value']:.4g}"
        for name, value in metrics.items()
        if isinstance(value, dict) and isinstance(value.get("value"), int | float)
    )


def checkpoint_summary(run: Run) -> str:
    """How many checkpoints were written and what they cost, in a sentence."""
    events = run.of_kind("checkpoint")
    if not events:
        return "No checkpoint has been written."
    writes = [float(e.get("write_seconds", 0)) for e in events]
    stalls = [float(e.get("stall_seconds", 0)) for e in events]
    newest = max(events, key=lambda e: e["time"])
    return (
        f"{counted(len(events), 'checkpoint')} written, the newest at {kimg(newest.get('nimg'))}. "
        f"Writing took at most {duration(max(writes))}, in the background; training was held up "
        f"for {duration(sum(stalls))} in all."
    )
