"""The page: everything a report shows, put into one file that requests nothing.

Style, script, drawings and pictures are inline. A content policy in the page lets a browser refuse
everything else, so that neither a mistake here nor a name in a run's files can make it load
anything or run another script.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import ganscale
from ganscale.atomic_files import write_text
from ganscale.report import summary, text
from ganscale.report.advice import Advice, advice_for
from ganscale.report.curves import Group, Line, groups_of, step_parts
from ganscale.report.pictures import Album, album_of
from ganscale.report.plots import (
    DASHES,
    NUM_COLOURS,
    Plot,
    panel_plot,
    part_colour,
    step_plot,
    timeline_plot,
)
from ganscale.report.runs import Run, open_runs
from ganscale.report.settings import Difference, difference_from_preset, differences_between
from ganscale.report.status import Status, status_of
from ganscale.report.timeline import Happening, checkpoint_summary, happenings, timeline_of
from ganscale.run_directory import RunDirectory

_PICTURE_BYTES = 250_000
"""Of a picture, divided by the number of runs, so that the page is small enough to be sent."""
_NUM_BUCKETS = 240
_MAX_MARKS = 40
_READOUTS = 8


@dataclass(frozen=True)
class Report:
    """What was written."""

    path: Path
    num_bytes: int


@dataclass(frozen=True)
class Legend:
    """A line of a figure in words: its style, its name and its newest value."""

    colour: int
    dash: int
    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Figure:
    """A panel of curves."""

    title: str
    unit: str
    plot: Plot
    legend: list[Legend]


@dataclass(frozen=True)
class Part:
    """A part of a step: its mean time and its portion of all parts."""

    colour: int
    name: str
    milliseconds: str
    portion: str


@dataclass
class RunView:
    """All that the page shows of one run."""

    run: Run
    status: Status
    facts: list[tuple[str, str]]
    advice: list[Advice]
    parts: list[Part]
    step: Plot | None
    timeline: Plot | None
    happenings: list[Happening]
    num_left_out: int
    checkpoints: str
    measurements: list[summary.Measurement]
    difference: Difference | None
    machine: list[tuple[str, str]]
    attempts: list[tuple[str, ...]]
    album: Album
    readouts: list[str]


def write_report(places: Sequence[str], out: Path | None = None) -> Report:
    """Write the report on some runs, given their folders.

    `out` is by default `report.html` in the run's folder, or in the current folder for several
    runs. Raises `ConfigError` if a folder is no run's.
    """
    runs = open_runs(places)
    if out is None:
        out = RunDirectory(runs[0].root).report if len(runs) == 1 else Path("report.html")
    page = _render(runs)
    # Without fsync: after a crash of the machine it can be made again.
    write_text(out, page, fsync=False)
    return Report(out, len(page.encode()))


def _render(runs: Sequence[Run]) -> str:
    limit = _PICTURE_BYTES // len(runs)
    views = [_view(run, number, limit) for number, run in enumerate(runs)]
    groups = groups_of(runs, num_buckets=max(60, _NUM_BUCKETS // len(runs)))
    figures = [(group, _figures(group, views)) for group in groups]
    package = resources.files("ganscale.report")
    script = package.joinpath("page.js").read_text()
    context: dict[str, Any] = {
        "title": ", ".join(run.name for run in runs),
        "made": text.clock(time.time()),
        "version": ganscale.__version__,
        "views": views,
        "begun": any(not run.is_empty for run in runs),
        "groups": figures,
        "differing": differences_between(runs) if len(runs) > 1 else [],
        "style": Markup(package.joinpath("page.css").read_text()),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "text": text,
        "slider": _slider(views),
    }
    environment = Environment(
        loader=PackageLoader("ganscale.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(context)


def _view(run: Run, number: int, limit: int) -> RunView:
    status = status_of(run)
    timeline = timeline_of(run)
    parts = step_parts(run)
    listed, left_out = happenings(run)
    return RunView(
        run=run,
        status=status,
        facts=summary.facts(run),
        advice=advice_for(run, status, parts),
        parts=_parts(parts),
        step=step_plot(parts, f"step-{number}") if _is_curve(parts) else None,
        timeline=None if timeline is None else timeline_plot(timeline, f"timeline-{number}"),
        happenings=listed,
        num_left_out=left_out,
        checkpoints=checkpoint_summary(run),
        measurements=summary.measurements(run),
        difference=None if run.config is None else difference_from_preset(run.config),
        machine=summary.machine(run),
        attempts=summary.attempts(run),
        album=album_of(run, limit),
        readouts=_readout_names(run),
    )


def _figures(group: Group, views: Sequence[RunView]) -> list[Figure]:
    several = len(views) > 1
    # Over curves of several runs the marks of all would tell nothing.
    marks = [] if several else _marks(views[0].run)
    figures = []
    for number, panel in enumerate(group.panels):
        labels = list(dict.fromkeys(line.label for line in panel.lines))
        # One run: a colour for each name. Several: a colour for each run, a dash for each name.
        styles = [
            (line.run, labels.index(line.label)) if several else (labels.index(line.label),) * 2
            for line in panel.lines
        ]
        ident = f"{group.title.split()[0].lower()}-{number}"
        legend = [
            _legend(line, style, views[line.run].run.name if several else "")
            for line, style in zip(panel.lines, styles, strict=True)
        ]
        plot = panel_plot(panel, ident, marks, styles)
        figures.append(Figure(panel.title, panel.unit, plot, legend))
    return figures


def _legend(line: Line, style: tuple[int, int], run_name: str) -> Legend:
    label = f"{run_name}: {line.label}" if run_name else line.label
    note = f"{line.num_not_finite} not finite" if line.num_not_finite else ""
    return Legend(
        style[0] % NUM_COLOURS, style[1] % len(DASHES), label, text.number(line.last), note
    )


def _marks(run: Run) -> list[float]:
    """Positions in kimg at which something went wrong."""
    kinds = ("alarm", "rollback", "resume", "checkpoint_failed", "evaluation_failed")
    events = [event for event in run.history.events if event["event"] in kinds]
    positions = sorted({event["nimg"] / 1000 for event in events})
    step = -(-len(positions) // _MAX_MARKS) or 1
    return positions[::step]


def _is_curve(parts: dict[str, list[tuple[float, float]]]) -> bool:
    return any(len(points) > 1 for points in parts.values())


def _parts(parts: dict[str, list[tuple[float, float]]]) -> list[Part]:
    rows = max((len(points) for points in parts.values()), default=0)
    # Over all rows: a part that a row does not have took no time in it.
    means = {name: sum(y for _, y in points) / rows for name, points in parts.items()}
    whole = sum(means.values())
    return [
        Part(part_colour(name), name, text.number(mean, 3), f"{mean / whole:.1%}")
        for name, mean in means.items()
    ]


def _slider(views: Sequence[RunView]) -> dict[str, Any] | None:
    """What the slider's script needs: positions, and for each run its pictures and values there."""
    positions = sorted({frame.nimg for view in views for frame in view.album.frames})
    if not positions:
        return None
    runs = [
        [
            {
                "nimg": frame.nimg,
                # The newest one is in the page already.
                "url": "" if frame is view.album.frames[-1] else frame.picture.url,
                "values": [
                    text.number(view.run.latest(name, frame.nimg)) for name in view.readouts
                ],
            }
            for frame in view.album.frames
        ]
        for view in views
    ]
    return {
        "positions": positions,
        "labels": [text.kimg(position) for position in positions],
        "runs": runs,
    }


def _readout_names(run: Run) -> list[str]:
    """Columns whose values stand beside the samples."""
    wanted = ("metrics/", "train/loss_", "train/real_", "train/fake_", "train/squared_error")
    names = [
        name
        for prefix in wanted
        for name in run.columns
        if name.startswith(prefix) and not name.startswith("train/loss_scale")
    ]
    return list(dict.fromkeys(names))[:_READOUTS]
