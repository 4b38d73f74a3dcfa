"""A run in short: its key figures, its metrics with their protocols, its machines and attempts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ganscale.report import text
from ganscale.report.runs import Run
from ganscale.tracking.history import Row


@dataclass(frozen=True)
class Measurement:
    """A metric with its protocol, as a row of the table."""

    at: str
    name: str
    value: str
    interval: str
    protocol: str


def facts(run: Run) -> list[tuple[str, str]]:
    """The figures that somebody looks for first."""
    if run.is_empty:
        return []
    position = text.kimg(run.nimg)
    if run.total_nimg is not None:
        position += f" of {text.kimg(run.total_nimg)}"
    shown = [("position", position), ("time", text.duration(run.seconds))]
    if run.images_per_second:
        shown.append(("speed", f"{text.number(run.images_per_second, 3)} images/s"))
    if run.attempts:
        begin = run.attempts[-1].begin
        precision = f"{begin.get('device', '')} {begin.get('precision', '')}".strip()
        shown.append(("workers", f"{begin.get('world_size', '?')} × {precision}"))
    best = _best_distance(run)
    if best is not None:
        shown.append(best)
    diversity = run.latest("metrics/diversity")
    if diversity is not None:
        shown.append(("diversity", text.number(diversity, 3)))
    faults = len(run.of_kind("fault", "group_lost", "alarm", "stall", "checkpoint_failed"))
    restarts = len(run.of_kind("resume", "rollback"))
    shown.append(("faults, restarts", f"{faults}, {restarts}"))
    if run.last_time is not None:
        shown.append(("last sign", text.clock(run.last_time)))
    return shown


def _best_distance(run: Run) -> tuple[str, str] | None:
    """The lowest Frechet distance of the run, with its interval if that is known."""
    names = [n for n in run.columns if n == "metrics/fid" or n.startswith("metrics/fd_")]
    for name in names:
        points = [(x, y) for x, y in run.points(name) if math.isfinite(y)]
        if not points:
            continue
        kimg, value = min(points, key=lambda point: point[1])
        short = name.removeprefix("metrics/")
        interval = ""
        for event in run.evaluations:
            estimate = event["metrics"].get(short, {})
            if estimate.get("value") == value and estimate.get("low") is not None:
                interval = f" ({_bounds(estimate)})"
        label = "FID" if short == "fid" else short
        return f"best {label}", f"{text.number(value)}{interval} at {text.kimg(1000 * kimg)}"
    return None


def _bounds(estimate: Row) -> str:
    return f"{text.number(estimate['low'])} to {text.number(estimate['high'])}"


def measurements(run: Run) -> list[Measurement]:
    """The newest metrics of training, then those of each evaluation afterwards."""
    rows = []
    for event in run.evaluations:
        protocol = event.get("protocol") or {}
        words = (
            f"{protocol.get('num_samples', '?')} samples, {protocol.get('extractor', '?')}, "
            f"against {protocol.get('reference', '?')}"
        )
        for name, estimate in event["metrics"].items():
            if not isinstance(estimate, dict) or "value" not in estimate:
                continue
            interval = _bounds(estimate) if estimate.get("low") is not None else "–"
            value = text.number(estimate["value"])
            rows.append(Measurement(text.kimg(event["nimg"]), name, value, interval, words))
    return [*_measured_in_training(run), *rows]


def _measured_in_training(run: Run) -> Iterator[Measurement]:
    """The newest values of metrics that training has measured, of which no interval is kept."""
    config = run.config
    words = "during training"
    if config is not None:
        against = config.evaluation.reference or "the training set"
        words = f"{config.evaluation.num_images} samples, during training, against {against}"
    for name in run.columns:
        if not name.startswith("metrics/") or name == "metrics/diversity":
            continue
        measured = [row for row in run.training_rows if isinstance(row.get(name), int | float)]
        if measured:
            value = text.number(measured[-1][name])
            at = text.kimg(measured[-1]["nimg"])
            yield Measurement(at, name.removeprefix("metrics/"), value, "–", words)


def machine(run: Run) -> list[tuple[str, str]]:
    """Machine, versions and commit of the newest attempt."""
    begin = run.attempts[-1].begin if run.attempts else {}
    # Runs of earlier versions note less, and in their checkpoints.
    versions = begin.get("versions") or run.newest_meta.get("versions") or {}
    computer = begin.get("machine") or {}
    rows = [(str(name), str(value)) for name, value in computer.items() if value is not None]
    rows += [(f"{name}", str(version)) for name, version in versions.items()]
    if begin.get("commit"):
        rows.append(("commit", str(begin["commit"])))
    elif rows:
        rows.append(("commit", "not noted: the code was no git checkout"))
    return rows


def attempts(run: Run) -> list[tuple[str, ...]]:
    """Number, event, time, position, duration, workers, host and commit of each attempt."""
    return [
        (
            str(attempt.number),
            str(attempt.begin["event"]),
            text.clock(attempt.begin["time"]),
            text.kimg(attempt.begin["nimg"]),
            text.duration(attempt.seconds),
            str(attempt.begin.get("world_size", "–")),
            str((attempt.begin.get("machine") or {}).get("host", "–")),
            str(attempt.begin.get("commit") or "–")[:12],
        )
        for attempt in run.attempts
    ]
