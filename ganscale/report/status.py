"""What has become of a run: finished, running, stopped, failed, interrupted, or not begun.

The files decide, as the holder of a run leaves them: the last event says how the run ended, and
where none does, the holder's file tells a live process from a dead one. A report is made once, so
"running" means at that time.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ganscale.processes import machine_id, process_start
from ganscale.report.runs import Run
from ganscale.report.text import duration
from ganscale.tracking.history import BEGINNINGS, Row

Kind = Literal["empty", "finished", "running", "stopped", "failed", "interrupted"]

_SILENT_SECONDS = 60.0
"""A holder renews its file six times in this time (`ganscale.checkpoint.holder`)."""
_PATIENCE_ROWS = 5.0
"""Usual distances between rows after which a run without a holder's file counts as interrupted."""
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
    if _is_alive(run):
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
    holder = _holder(run.root)
    if holder is not None:
        beat = run.root / "checkpoints" / "attempts" / f"session-{holder.get('session')}.json"
        if not beat.is_file():
            return False
        if holder.get("machine") == machine_id():
            return process_start(int(holder["pid"])) == holder.get("process_start")
        return time.time() - beat.stat().st_mtime < _SILENT_SECONDS
    # Checkpoints lie elsewhere, or training was called without a session: rows are the only sign.
    last = run.last_time
    # Clocks of hosts differ, so that a row may be from the future.
    return last is not None and abs(time.time() - last) < _patience_seconds(run)


def _holder(root: Path) -> dict[str, Any] | None:
    """The process that made the newest attempt, as its claim names it."""
    for path in sorted((root / "checkpoints" / "attempts").glob("a[0-9]*.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(path.read_bytes())["holder"]
            if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
                return holder
    return None


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
