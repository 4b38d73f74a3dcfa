"""How the trials of a sweep stand, as their run folders tell it.

A trial is an ordinary run, whose rows, events and checkpoints say all that a sweep has to know to
go on, so a sweep keeps no journal that could disagree with them. It adds two events to those of a
trial: `sweep_stop` when the scheduler has ended it, `copy` when it took over another's weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config, load_config
from ganscale.config.changes import changed_settings
from ganscale.config.sweep import Sweep, Trial
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from ganscale.tracking.sinks import EventLog

Reports = list[tuple[float, float | None]]  # position in kimg; the metric, None if not finite
_FID = re.compile(r"metrics/(fid|fd_(?!infinity|per_class)\w+)")


@dataclass
class TrialStatus:
    """How a trial stands; `kimg` and `score` are of its last report."""

    name: str
    values: dict[str, Any]
    """Of the fields that vary, as they are now."""
    state: str = "waiting"
    """waiting, running, paused, finished, stopped (by the scheduler), failed or interrupted."""
    kimg: float = 0.0
    score: float | None = None
    message: str = ""
    """Why the trial failed."""
    source: str = ""
    """The trial whose weights it took over last."""
    known: Reports = field(default_factory=list)
    """The reports that its folder held when it was read."""

    @property
    def is_over(self) -> bool:
        """Whether it is not taken up again, as failed and interrupted trials are."""
        return self.state in ("finished", "stopped")


def read_status(sweep: Sweep, trial: Trial) -> TrialStatus:
    """The status of a trial that nobody trains at the moment.

    Raises `ConfigError` if its folder holds a run with other settings.
    """
    status, run_dir = TrialStatus(trial.name, trial.values), RunDirectory(sweep.root / trial.name)
    events = read_lines(run_dir.events)
    for event in events:
        if event["event"] == "copy":
            status.values, status.source = event["values"], event["source"]
    config = sweep.config(trial.name, status.values)
    if not events:
        return status
    if not status.source and (changed := changed_settings(load_config(run_dir.config), config)):
        raise ConfigError(
            f"{run_dir.root} holds a run with other settings ({'; '.join(changed)}): choose "
            f"another name for the sweep, or remove {sweep.root}"
        )
    status.known = reports(sweep, config, *resume_point(config))
    status.kimg, status.score = status.known[-1] if status.known else (0.0, None)
    status.state = "finished" if status.kimg >= config.training.total_kimg else "interrupted"
    for event in events:
        if event["event"] == "sweep_stop":
            status.state, status.kimg, status.score = "stopped", event["kimg"], event["score"]
    return status


def resume_point(config: Config) -> tuple[int, int]:
    """The number of a run's next attempt, and the position that it begins at, in images."""
    store = CheckpointStore(config.checkpoints)
    newest, lineage = store.newest_attempt(), store.lineage()
    return newest.number + 1 if newest else 1, lineage[0].nimg if lineage else 0


def reports(sweep: Sweep, config: Config, attempt: int, start_nimg: int) -> Reports:
    """What a run reports, in order, if `attempt` of it begins at the position `start_nimg`.

    Rows of older attempts behind that do not count, as they are trained again. Positions are whole
    multiples of the distance between values, so that those of different trials can be compared,
    whatever the batch size; the end of the run is the last one.
    """
    every, end = sweep.every_kimg, config.training.total_kimg
    by_kimg: dict[float, float | None] = {}
    for row in History.read(RunDirectory(config.run_dir)).rows:
        column = metric_column(sweep.file.metric, row)
        if column is not None and (row["nimg"] <= start_nimg or row["attempt"] >= attempt):
            kimg = round(row["nimg"] // round(1000 * every) * every, 6)
            by_kimg.setdefault(end if row["nimg"] >= config.total_nimg else kimg, row[column])
    return sorted(by_kimg.items())


def missing_metric(sweep: Sweep, config: Config, attempt: int, start_nimg: int) -> str:
    """What is wrong if `attempt`, which began at `start_nimg`, logs no such metric; else empty.

    That is known at the second position at which the metric is due: the first may have been behind
    the row, or at an evaluation that failed.
    """
    metric, file = sweep.file.metric, RunDirectory(config.run_dir).metrics
    # A penalty that is taken every so many steps is in no row before the first of these.
    lazy = config.penalty.interval * config.training.batch_size
    due = start_nimg + max(round(2000 * sweep.every_kimg), lazy)
    rows = [row for row in read_lines(file) if row["attempt"] >= attempt]
    if all(row["nimg"] < due for row in rows) or any(metric_column(metric, row) for row in rows):
        return ""
    section = f"{metric.partition('/')[0]}/" if "/" in metric else "metrics/"
    logged = sorted({name for row in rows for name in row if name.startswith(section)})
    return f"no row of {file} has {metric}; there are {', '.join(logged) or 'no such columns'}"


def metric_column(metric: str, row: Mapping[str, Any]) -> str | None:
    """The column of a row that has the metric; None if it was not measured."""
    if metric != "fid":
        return metric if metric in row else None
    return next((name for name in row if _FID.fullmatch(name)), None)


def copy_trial(sweep: Sweep, source: TrialStatus, target: TrialStatus, values: Any) -> None:
    """Give a trial the newest verified checkpoint of another one, and other values.

    A kill before the event is written leaves a valid run with the weights and without the values.
    Raises `CheckpointError` if the source has no checkpoint that verifies.
    """
    config = sweep.config(target.name, values)
    run_dir, store = RunDirectory(config.run_dir), CheckpointStore(config.checkpoints)
    source_store = CheckpointStore(sweep.config(source.name, source.values).checkpoints)
    wandb_id, metrics = run_dir.wandb_run_id, run_dir.metrics
    own = {
        "config": config.model_dump(mode="json"),
        "wandb_run_id": wandb_id.read_text() if wandb_id.is_file() else "",
    }
    copied, name = store.copy_newest(source_store, own, metrics.read_bytes())
    fields = {"source": source.name, "checkpoint": source_store.where(copied), "values": values}
    with closing(EventLog(run_dir.events)) as log:
        log.write("copy", attempt=name.attempt, nimg=name.nimg, **fields)
    target.values, target.source = values, source.name
