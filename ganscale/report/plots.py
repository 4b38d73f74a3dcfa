"""Figures as SVG that takes its colours and its font from the page around it.

Matplotlib draws with placeholder colours, which become variables of the page's style sheet. So one
drawing serves light, dark and print. Text stays text, coordinates are rounded to a tenth of a
point, and what matplotlib writes for files that stand alone is removed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from ganscale.report.curves import Line, Panel, Point
from ganscale.report.timeline import Lane, Timeline

NUM_COLOURS = 8
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
"""On and off lengths of line styles, so that curves also differ without colours."""

_TEXT, _GRID, _MARK, _FAINT = "#000201", "#000202", "#000203", "#000204"
_VARIABLES = {_TEXT: "--faint", _GRID: "--grid", _MARK: "--alarm", _FAINT: "--lost"}
_VARIABLES |= {f"#0001{i:02x}": f"--line-{i}" for i in range(NUM_COLOURS)}
_STEPS = [1, 2, 5, 10]
_STACKED_POINTS = 200
_PARTS = {
    "discriminator": 0,
    "step": 0,
    "generator": 1,
    "autoencoder": 1,
    "generator and encoder": 1,
    "data wait": 2,
    "prepare": 3,
    "average": 4,
    "write": 5,
    "encoder": 6,
}
"""Colours of a step's parts; a method has no two of one colour."""
_POINTS_PER_INCH = 72
_WIDTH, _HEIGHT = 400.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 8.0, 8.0, 22.0
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.unicode_minus": True,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "path.simplify": False,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Plot:
    """A drawing, and what a script needs to read values off it."""

    svg: Markup
    ident: str
    box: str = ""
    """Left, right, bottom and top of the axes in the drawing."""
    limits: str = ""
    """The values at these; logarithms of base 10 on a logarithmic axis."""
    is_logarithmic: bool = False


def colour(index: int) -> str:
    """The placeholder of one of the page's colours for curves."""
    return f"#0001{index % NUM_COLOURS:02x}"


def part_colour(name: str) -> int:
    """The number of a colour for a part of a step, the same in all runs."""
    return _PARTS.get(name, NUM_COLOURS - 1)


def panel_plot(
    panel: Panel, ident: str, marks: Sequence[float], styles: Sequence[tuple[int, int]]
) -> Plot:
    """Curves over kimg.

    Args:
        panel: the curves.
        ident: differs between the figures of a page.
        marks: positions in kimg at which something went wrong.
        styles: the number of colour and dash of each line.
    """
    with _figure(ident, _WIDTH, _HEIGHT) as (figure, written):
        axes = _axes(figure, _WIDTH, _HEIGHT)
        for kimg in marks:
            axes.axvline(kimg, color=_MARK, linewidth=0.8, dashes=(2, 2), zorder=1)
        for index, (line, style) in enumerate(zip(panel.lines, styles, strict=True)):
            _draw_line(axes, line, f"{ident}-{index}", style)
        if panel.is_logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            # A single power of ten would say nothing of a narrow range.
            subs = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
            axes.minorticks_off()
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        box, limits = _box(axes, _WIDTH, _HEIGHT), _limits(axes, panel.is_logarithmic)
    return Plot(_inline(written.getvalue(), ident), ident, box, limits, panel.is_logarithmic)


def step_plot(parts: Mapping[str, Sequence[Point]], ident: str) -> Plot:
    """Milliseconds of a step, its parts one above the other, over kimg; means of several rows."""
    rows = sorted({x for points in parts.values() for x, _ in points})
    size = -(-len(rows) // _STACKED_POINTS)
    buckets = [rows[first : first + size] for first in range(0, len(rows), size)]
    at = [bucket[-1] for bucket in buckets]
    # A part that a row does not have took no time, such as a picture that is drawn now and then.
    values = [
        [sum(of.get(x, 0.0) for x in bucket) / len(bucket) for bucket in buckets]
        for of in map(dict, parts.values())
    ]
    with _figure(ident, _WIDTH, _HEIGHT) as (figure, written):
        axes = _axes(figure, _WIDTH, _HEIGHT)
        axes.stackplot(
            at,
            values,
            colors=[colour(part_colour(name)) for name in parts],
            linewidth=0,
        )
        axes.set_xlim(at[0], at[-1] if at[-1] > at[0] else at[0] + 1)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    return Plot(_inline(written.getvalue(), ident), ident)


def timeline_plot(timeline: Timeline, ident: str) -> Plot:
    """Position over time, and below it what happened, a lane for each kind."""
    width, left, lane_height, top, gap = 1060.0, 84.0, 20.0, 130.0, 12.0
    height = top + gap + lane_height * len(timeline.lanes) + 30
    with _figure(ident, width, height) as (figure, written):
        bottom = height - top
        rect = (left / width, bottom / height, (width - left - 10) / width, (top - 8) / height)
        upper = figure.add_axes(rect)
        lanes_height = lane_height * len(timeline.lanes)
        lower = figure.add_axes(
            (rect[0], (bottom - gap - lanes_height) / height, rect[2], lanes_height / height)
        )
        for segment in timeline.segments:
            style = _FAINT if segment.is_lost else colour(0)
            upper.plot(
                [x for x, _ in segment.points],
                [y for _, y in segment.points],
                color=style,
                linewidth=1.6,
                solid_capstyle="round",
            )
        for number, lane in enumerate(reversed(timeline.lanes)):
            _draw_lane(lower, lane, number)
        for axes in (upper, lower):
            _plain(axes)
            axes.set_xlim(0, timeline.end)
        upper.set_ylim(bottom=0)
        upper.tick_params(labelbottom=False)
        upper.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{_tick(y)} kimg"))
        lower.set_ylim(-0.5, len(timeline.lanes) - 0.5)
        lower.set_yticks(
            range(len(timeline.lanes)), [lane.name for lane in reversed(timeline.lanes)]
        )
        lower.xaxis.set_major_locator(MaxNLocator(9, steps=_STEPS))
        lower.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{_tick(x)} {timeline.unit}"))
    return Plot(_inline(written.getvalue(), ident), ident)


def _draw_line(axes: Axes, line: Line, name: str, style: tuple[int, int]) -> None:
    shade, dash = colour(style[0]), DASHES[style[1] % len(DASHES)]
    (drawn,) = axes.plot(
        [x for x, _ in line.points],
        [y for _, y in line.points],
        color=shade,
        linewidth=1.4,
        # Sparse values, such as metrics, are also shown as what they are: points.
        marker="o" if len(line.points) <= 30 else "",
        markersize=3.5,
        markeredgewidth=0,
        zorder=3,
    )
    if dash:
        drawn.set_dashes(dash)
    drawn.set_gid(name)
    if line.ranges:
        axes.fill_between(
            [bar.kimg for bar in line.ranges],
            [bar.low for bar in line.ranges],
            [bar.high for bar in line.ranges],
            color=shade,
            alpha=0.22,
            linewidth=0,
        )
    for bar in line.bars:
        axes.plot([bar.kimg] * 2, [bar.low, bar.high], color=shade, linewidth=1.2, zorder=2)


def _draw_lane(axes: Axes, lane: Lane, number: int) -> None:
    for start, end, label in lane.bars:
        axes.barh(number, end - start, left=start, height=0.6, color=colour(0), alpha=0.3)
        if label:
            axes.annotate(
                label,
                (start, number),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                clip_on=True,
            )
    if lane.marks:
        axes.vlines(
            lane.marks,
            number - 0.3,
            number + 0.3,
            color=_MARK if lane.is_bad else _TEXT,
            linewidth=2.0 if lane.is_bad else 1.2,
        )


def _axes(figure: Figure, width: float, height: float) -> Axes:
    axes = figure.add_axes(
        (
            _LEFT / width,
            _BOTTOM / height,
            (width - _LEFT - _RIGHT) / width,
            (height - _TOP - _BOTTOM) / height,
        )
    )
    _plain(axes)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    return axes


def _plain(axes: Axes) -> None:
    """Grid lines instead of a frame and ticks."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=4)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)


def _tick(value: float, _: object = None) -> str:
    """A tick's label: 0.25, 300, 25k, 1.5M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return "0" if abs(value) < 1e-12 else f"{value:.6g}".replace("-", "−")


def _box(axes: Axes, width: float, height: float) -> str:
    place = axes.get_position()
    sides = (place.x0 * width, place.x1 * width, (1 - place.y0) * height, (1 - place.y1) * height)
    return " ".join(f"{side:.1f}" for side in sides)


def _limits(axes: Axes, is_logarithmic: bool) -> str:
    values = axes.get_ylim()
    if is_logarithmic:
        values = (math.log10(values[0]), math.log10(values[1]))
    return " ".join(f"{value:.6g}" for value in (*axes.get_xlim(), *values))


@contextmanager
def _figure(ident: str, width: float, height: float) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure whose SVG is written when the block ends."""
    # The settings of this machine's user must not change a report; names inside the drawing must
    # differ from those of the other drawings of the page.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS, "svg.hashsalt": ident}):
        figure = Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH))
        figure.patch.set_visible(False)
        written = io.StringIO()
        yield figure, written
        figure.savefig(written, format="svg", dpi=_POINTS_PER_INCH)


def _inline(svg: str, ident: str) -> Markup:
    """A file of matplotlib's as an element of a page, in which its names are unique."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # It would be a style of the whole page, not of this drawing.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    head = f'<svg class="drawing" viewBox="0 0 {width} {height}" aria-hidden="true">'
    svg = re.sub(r"<svg[^>]*>", head, svg, count=1)
    # Others than those of curves, and those that the drawing itself refers to, name nothing.
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(
        r' id="([^"]*)"',
        lambda match: match[0] if match[1] in used or match[1].startswith(f"{ident}-") else "",
        svg,
    )
    svg = re.sub(r"#000[12][0-9a-f]{2}", lambda match: f"var({_VARIABLES[match[0]]})", svg)
    # The page's own font; matplotlib has only measured with another one.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Of tags alone: between them are the labels of ticks.
    svg = re.sub(r"<[^>]+>", lambda match: _rounded(match[0]), svg)
    return Markup(re.sub(r"\s*\n\s*", " ", svg).strip())


def _rounded(tag: str) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), tag)
