"""Which curves a report draws, and their points, few enough for a file that is sent around.

The panels are those of the W&B dashboard (`ganscale.tracking.dashboard`), so both show the same
things under the same titles. Metrics on different scales get a panel each, and columns that no
panel knows get their own. A long curve is drawn by its means over many short stretches, within the
band of its smallest and largest values, so that neither its course nor any peak is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ganscale.report.runs import Run
from ganscale.tracking.dashboard import SECTIONS, WITHOUT_PANEL, Curve

Point = tuple[float, float]

_OWN_PANEL = ("distances", "inception score, authenticity, two-sample tests")
"""Panels whose columns have different scales."""
_STEP = "parts of a step"
_EVALUATION = "time/evaluation_seconds"
"""The seconds of an evaluation, all of it, and not of a step."""
_UNITS = {
    "wait for data, by worker": "seconds of a step",
    "memory, by worker": "GiB",
    "processor, by worker": "% of a core",
    "GPU memory, by worker": "GiB",
    "peak GPU memory of rank 0": "GiB",
}
_MAX_WORKERS = 4
"""Lines of workers in a panel; more are shown by their mean, smallest and largest."""
_MAX_OTHERS = 12


@dataclass(frozen=True)
class Bar:
    """An interval of values at a position."""

    kimg: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A curve of a run: points (kimg, value) by position, NaN where a value was not finite."""

    label: str
    run: int
    """Number of the run in the report."""
    points: list[Point]
    last: float | None
    """The newest finite value."""
    num_not_finite: int = 0
    bars: tuple[Bar, ...] = ()
    ranges: tuple[Bar, ...] = ()
    """Where points are means of many values, the smallest and the largest of these."""


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes."""

    title: str
    lines: tuple[Line, ...]
    is_logarithmic: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Group:
    """Panels under one heading."""

    title: str
    text: str
    panels: tuple[Panel, ...]
    constants: tuple[Line, ...] = ()
    """Curves that never change, which are shown as their value."""


def groups_of(runs: Sequence[Run], *, num_buckets: int) -> list[Group]:
    """All panels of some runs that have something to show.

    Lines of all runs share a panel. Those that have more than twice as many points as
    `num_buckets` are averaged in so many buckets.
    """
    columns = list(dict.fromkeys(name for run in runs for name in run.columns))
    groups = []
    shown: set[str] = set(WITHOUT_PANEL)
    for section in SECTIONS:
        curves = [panel for panel in section.panels if isinstance(panel, Curve)]
        panels = []
        for curve, names in _chosen(curves, columns):
            shown |= set(names)
            if curve.title != _STEP:  # `step_parts` has a figure of its own
                panels.append(_panel(curve, names, runs, num_buckets))
        groups.append(_group(section.name, section.text, panels))
    others = [name for name in columns if name not in shown][:_MAX_OTHERS]
    panels = [_panel(Curve(_short(name)), [name], runs, num_buckets) for name in others]
    text = "Columns that this version of ganscale has no panel for."
    groups.append(_group("Other columns", text, panels))
    return [group for group in groups if group.panels or group.constants]


def step_parts(run: Run) -> dict[str, list[Point]]:
    """Milliseconds of a step by part and position, largest part first.

    A step that is replayed as a CUDA graph is one part, "step".
    """
    names = [name for name in run.columns if re.fullmatch(r"time/.*_seconds", name)]
    parts = {}
    for name in names:
        if name == _EVALUATION:
            continue
        points = [(x, 1000 * y) for x, y in run.points(name) if math.isfinite(y)]
        if any(y for _, y in points):
            parts[name.removeprefix("time/").removesuffix("_seconds").replace("_", " ")] = points
    return dict(sorted(parts.items(), key=lambda part: -sum(y for _, y in part[1])))


def averaged(points: Sequence[Point], num_buckets: int) -> tuple[list[Point], tuple[Bar, ...]]:
    """The mean of each of some buckets of points, and its smallest and largest value.

    Buckets have equally many points. A mean stands in the middle of its bucket; it is NaN, and has
    no range, where a bucket has no finite value.
    """
    means: list[Point] = []
    ranges = []
    for bucket in range(num_buckets):
        first = bucket * len(points) // num_buckets
        last = (bucket + 1) * len(points) // num_buckets
        middle = (points[first][0] + points[last - 1][0]) / 2
        finite = [y for _, y in points[first:last] if math.isfinite(y)]
        means.append((middle, sum(finite) / len(finite) if finite else math.nan))
        if finite:
            ranges.append(Bar(middle, min(finite), max(finite)))
    return means, tuple(ranges)


def _chosen(curves: Sequence[Curve], columns: Sequence[str]) -> Iterator[tuple[Curve, list[str]]]:
    """Panels with the columns that each shows."""
    for curve in curves:
        names = [name for name in curve.names if name in columns]
        if curve.regex is not None:
            names += [name for name in columns if re.fullmatch(curve.regex, name)]
        if curve.title in _OWN_PANEL:
            yield from ((replace(curve, title=_short(name)), [name]) for name in names)
        elif names:
            yield curve, names


def _panel(curve: Curve, names: Sequence[str], runs: Sequence[Run], num_buckets: int) -> Panel:
    lines = [
        line for number, run in enumerate(runs) for line in _lines(run, number, names, num_buckets)
    ]
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    values += [bar.low for line in lines for bar in line.ranges]
    return Panel(
        curve.title,
        tuple(lines),
        # A logarithmic axis cannot show a zero.
        is_logarithmic=curve.is_logarithmic and bool(values) and min(values) > 0,
        unit=_UNITS.get(curve.title, ""),
    )


def _lines(run: Run, number: int, names: Sequence[str], num_buckets: int) -> list[Line]:
    curves = {name: points for name in names if (points := run.points(name))}
    if len(curves) > _MAX_WORKERS and all(name.startswith("workers/") for name in names):
        points = sorted(x for points in curves.values() for x in points if math.isfinite(x[1]))
        if not points:
            return []
        # Workers log at the same positions, so a bucket of one position has a value of each.
        means, ranges = averaged(points, min(len({x for x, _ in points}), num_buckets))
        return [Line("mean of the workers", number, means, means[-1][1], ranges=ranges)]
    lines = []
    for name, points in curves.items():
        finite = [y for _, y in points if math.isfinite(y)]
        line = Line(
            _short(name),
            number,
            points,
            last=finite[-1] if finite else None,
            num_not_finite=len(points) - len(finite),
            bars=_bars(run, name),
        )
        if len(points) > 2 * num_buckets:
            means, ranges = averaged(points, num_buckets)
            line = replace(line, points=means, ranges=ranges)
        lines.append(line)
    return lines


def _bars(run: Run, name: str) -> tuple[Bar, ...]:
    """The intervals of a metric, where an evaluation noted them."""
    bars = []
    for event in run.evaluations:
        estimate = event["metrics"].get(name.removeprefix("metrics/"))
        if not isinstance(estimate, Mapping):
            continue
        low, high = estimate.get("low"), estimate.get("high")
        if isinstance(low, int | float) and isinstance(high, int | float):
            bars.append(Bar(event["nimg"] / 1000, float(low), float(high)))
    return tuple(bars)


def _group(title: str, text: str, panels: Sequence[Panel]) -> Group:
    """Panels without those that show nothing: of single values, and of values that never change."""
    # A single value is one of an evaluation, which the table of metrics has.
    panels = [panel for panel in panels if any(len(line.points) > 1 for line in panel.lines)]
    drawn = [panel for panel in panels if not all(map(_is_constant, panel.lines))]
    constants = [line for panel in panels if panel not in drawn for line in panel.lines]
    return Group(title, text, tuple(drawn), tuple(constants))


def _is_constant(line: Line) -> bool:
    values = {y for _, y in line.points} | {y for bar in line.ranges for y in (bar.low, bar.high)}
    return len(values) == 1


def _short(name: str) -> str:
    """A column's name without its family, such as "loss D", "worker 0"."""
    family, _, rest = name.partition("/")
    if family == "workers":
        return f"worker {rest.partition('/')[0]}"
    if family in ("train", "metrics", "time", "data", "gpu"):
        return rest.replace("_", " ")
    return name
