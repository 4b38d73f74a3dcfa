"""What has become of a run: finished, running, stopped, failed, interrupted, or not begun.

The files decide, as the holder of a run leaves them: the last event says how the run ended, and
where none does, the holder's file beside the checkpoints tells a live process from a dead one.
Where that cannot be read, a run that was silent for a while may train or not. A report is made
once, so "running" means at that time.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from ganscale.errors import GanscaleError
from ganscale.processes import machine_id, process_start
from ganscale.report.runs import Run
from ganscale.report.text import duration
from ganscale.storage import MissingData, Store, one_line, open_store
from ganscale.tracking.history import BEGINNINGS, Row

Kind = Literal["empty", "finished", "running", "stopped", "failed", "interrupted", "unknown"]

_SILENT_SECONDS = 60.0
"""A holder renews its file six times in this time (`ganscale.checkpoint.holder`)."""
_PATIENCE_ROWS = 5.0
"""Usual distances between rows after which a run without a holder's file counts as interrupted."""
_CLAIM = re.compile(r"attempts/a[0-9]+\.json")
_LIFE = (*BEGINNINGS, "end", "stop", "fault", "group_lost", "waiting", "regroup")
"""Events after which it is known what the run was about to do."""


@dataclass(frozen=True)
class Status:
    """A word for people, and a sentence with the reason."""

    kind: Kind
    reason: str


def status_of(run: Run) -> Status:
    """The status of a run as its files are now."""
    if run.is_empty:
        return Status("empty", "This folder holds nothing of a run yet.")
    last = _last_sign(run)
    if last is not None and last["event"] == "end":
        return Status("finished", "It has reached its length.")
    if last is not None and last["event"] == "stop":
        return Status("stopped", f"It was stopped ({last.get('reason') or 'no reason noted'}).")
    try:
        is_alive = _is_alive(run)
    except (OSError, GanscaleError) as error:
        is_alive = _has_written_lately(run)
        if not is_alive:
            return Status(
                "unknown",
                "It has written nothing for a while, and whether its process is alive cannot be "
                f"told from here: its checkpoints cannot be read ({one_line(error)}).",
            )
    if is_alive:
        waits = last is not None and last["event"] == "waiting"
        return Status("running", "It waits for workers." if waits else "Its process is alive.")
    if last is not None and last["event"] in ("fault", "group_lost"):
        return Status("failed", _sentence(str(last.get("message", ""))))
    alarms = run.of_kind("alarm")
    # Without a driver, a run that the guard ends leaves the alarm as its last word.
    if alarms and alarms[-1].get("action") == "stop":
        return Status("failed", _sentence(str(alarms[-1].get("message", ""))))
    if last is None:
        return Status("interrupted", "No attempt has begun to train.")
    return Status("interrupted", "Its process ended without a word: it was killed, or lost.")


def _last_sign(run: Run) -> Row | None:
    """The newest event of the last attempt, or of the driver, that tells how things stand."""
    newest = max((attempt.number for attempt in run.attempts), default=0)
    signs = [e for e in run.of_kind(*_LIFE) if e.get("attempt", newest) == newest]
    return signs[-1] if signs else None


def _is_alive(run: Run) -> bool:
    """Raises `OSError` or `GanscaleError` if the place of the checkpoints cannot be read."""
    config = run.config
    if config is None or config.checkpoint.location is None:
        backend = open_store(run.root / "checkpoints")  # the folder may have been moved
    else:
        backend = open_store(config.checkpoints)
    claims = sorted(filter(_CLAIM.fullmatch, backend.files()), reverse=True)
    if not claims and config is not None and config.checkpoint.location is not None:
        raise FileNotFoundError(f"{backend.location} has no attempt of the run")
    holder = _holder(backend, claims)
    if holder is None:  # training was called without a session: rows are the only sign
        return _has_written_lately(run)
    try:
        beat = backend.read(f"attempts/session-{holder.get('session')}.json")
    except MissingData:
        return False
    if holder.get("machine") == machine_id():
        return process_start(int(holder["pid"])) == holder.get("process_start")
    with suppress(ValueError, KeyError, TypeError):  # what is damaged is renewed by nobody
        return time.time() - float(json.loads(beat)["time"]) < _SILENT_SECONDS
    return False


def _holder(backend: Store, claims: Sequence[str]) -> dict[str, Any] | None:
    """The process that made the newest attempt, as its claim names it."""
    for claim in claims:
        with suppress(MissingData, ValueError, KeyError, TypeError):
            holder = json.loads(backend.read(claim))["holder"]
            if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
                return holder
    return None


def _has_written_lately(run: Run) -> bool:
    last = run.last_time
    # Clocks of hosts differ, so that a row may be from the future.
    return last is not None and abs(time.time() - last) < _patience_seconds(run)


def _patience_seconds(run: Run) -> float:
    times = sorted(row["time/unix"] for row in run.rows if "step" in row and "time/unix" in row)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return max(2 * _SILENT_SECONDS, _PATIENCE_ROWS * median(gaps) if gaps else 0.0)


def _sentence(message: str) -> str:
    text = " ".join(message.split())
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def remaining(run: Run) -> str:
    """How long a run will train on at its usual speed; empty where that is unknown."""
    speed, total = run.images_per_second, run.total_nimg
    if not speed or total is None or run.nimg >= total:
        return ""
    return duration((total - run.nimg) / speed)
