"""How reliably a recipe trains: the same run with other seeds, summarised from the runs' files.

A run counts as collapsed when an alarm of the guard is part of its history (one that a rollback
undid is not), or when the last sample grid has less than a quarter of the best one's diversity. So
the share includes runs that went wrong for a while as well as those that ended badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ganscale.config import load_config
from ganscale.errors import CheckpointError, ConfigError
from ganscale.metrics.intervals import Estimate, t_interval, wilson_interval
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History

# The guard's fraction, which is repeated here because evaluation does not import training.
_LOST_DIVERSITY = 0.25
"""Fraction of a run's best diversity; a run that ends below it has collapsed."""

_DIVERSITY = "metrics/diversity"
_SPEED = "time/images_per_second"


@dataclass(frozen=True)
class RunSummary:
    """How one run ended, and its last value of the metric that was asked for."""

    name: str
    seed: int
    nimg: int
    """Position of its last row."""
    finished: bool
    collapses: tuple[str, ...]
    """Why it counts as collapsed: kinds of alarms, "lost diversity"; empty if it does not."""
    rollbacks: int
    value: float | None
    """The metric's last value; None if the run has none."""
    images_per_second: float | None
    """Median over its rows."""


@dataclass(frozen=True)
class Spread:
    """The distribution of the runs' final values."""

    median: float
    lower_quartile: float
    upper_quartile: float
    low: float
    high: float
    mean: Estimate
    """The mean with Student's t interval over the runs."""


@dataclass(frozen=True)
class StabilityReport:
    """How often runs of one recipe collapsed, and how their final values are spread."""

    metric: str
    runs: tuple[RunSummary, ...]
    collapsed: Estimate
    """Share of the runs that collapsed, with Wilson's interval."""
    spread: Spread | None
    """Over the runs that have a value; None if none has."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Lines for a terminal: one for each run, then the share and the spread."""
        width = max(len(run.name) for run in self.runs)
        heading = f"{'run':{width}}  seed      kimg     img/s  {self.metric}"
        lines = [heading, *(_line(run, width) for run in self.runs)]
        number = sum(bool(run.collapses) for run in self.runs)
        share = f"collapsed {number} of {len(self.runs)}: {self.collapsed}"
        if self.spread is None:
            return [*lines, share, f"no run has a value of {self.metric}"]
        spread = self.spread
        return [
            *lines,
            share,
            f"{self.metric}: median {spread.median:.4g}, quartiles {spread.lower_quartile:.4g} "
            f"and {spread.upper_quartile:.4g}, range {spread.low:.4g} to {spread.high:.4g}, "
            f"mean {spread.mean}",
        ]


def summarise_run(root: Path, metric: str) -> RunSummary:
    """Read one run's files. Raises `CheckpointError` if the folder is no run."""
    run_dir = RunDirectory(root.expanduser().absolute())
    if not run_dir.config.is_file():
        raise CheckpointError(f"{root} is not a run: it has no {run_dir.config.name}")
    history = History.read(run_dir)
    values, speeds = history.series(metric), history.series(_SPEED)
    config = load_config(run_dir.config)
    ends = [event["nimg"] for event in history.events if event["event"] == "end"]
    return RunSummary(
        name=run_dir.name,
        seed=config.seed,
        nimg=max((row["nimg"] for row in history.rows), default=0),
        # An end before the configured length is that of a run that was made longer since.
        finished=max(ends, default=0) >= config.total_nimg,
        collapses=_collapses(history),
        # The event that begins an attempt carries the number of rollbacks so far.
        rollbacks=max((event.get("num_rollbacks", 0) for event in history.events), default=0),
        value=values[-1][1] if values else None,
        # The median, since the rows after a start or a pause of the machine are slow.
        images_per_second=float(np.median([v for _, v in speeds])) if speeds else None,
    )


def summarise(runs: Sequence[RunSummary], metric: str) -> StabilityReport:
    """The share of collapsed runs and the spread of their values.

    Raises `ConfigError` without a run.
    """
    if not runs:
        raise ConfigError("a stability report needs at least one run")
    # Wilson's interval says how little five seeds without a collapse prove: up to 43 % may
    # collapse.
    collapsed = wilson_interval(sum(bool(run.collapses) for run in runs), len(runs))
    values = [run.value for run in runs if run.value is not None]
    return StabilityReport(metric, tuple(runs), collapsed, _spread(values) if values else None)


def _spread(values: Sequence[float]) -> Spread:
    low, lower, median, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return Spread(median, lower, upper, low, high, t_interval(values))


def _collapses(history: History) -> tuple[str, ...]:
    # A dictionary keeps each kind once, in the order of the first alarms.
    reasons = dict.fromkeys(e["kind"] for e in history.events if e["event"] == "alarm")
    diversities = [value for _, value in history.series(_DIVERSITY)]
    if diversities and diversities[-1] < _LOST_DIVERSITY * max(diversities):
        reasons["lost diversity"] = None
    return tuple(reasons)


def _line(run: RunSummary, width: int) -> str:
    speed = "-" if run.images_per_second is None else f"{run.images_per_second:.0f}"
    value = "-" if run.value is None else f"{run.value:.4g}"
    notes = [] if run.finished else ["unfinished"]
    if run.collapses:
        notes.append(f"collapsed: {', '.join(run.collapses)}")
    if run.rollbacks:
        notes.append(f"rollbacks: {run.rollbacks}")
    text = f"{run.name:{width}}  {run.seed:4}  {run.nimg / 1000:8.1f}  {speed:>8}  {value}"
    return "  ".join([text, *notes])
