"""A run's rows and events as the run is now, without those that later attempts have replaced.

Every attempt appends to the same files. Where one starts from an earlier position than was reached
(after a fault, a rollback), what older attempts wrote after that position is no longer part of the
run; a host that was cut off may even write it after its successor has begun. So the numbers of the
attempts decide what counts, not the order of the lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory

Row = Mapping[str, Any]

BEGINNINGS = ("start", "resume", "rollback")
"""Events that begin an attempt."""


@dataclass(frozen=True)
class History:
    """The effective rows and events of a run, by position; events without one are left out."""

    rows: list[Row]
    events: list[Row]

    @classmethod
    def read(cls, run_dir: RunDirectory) -> Self:
        """From the run's files; missing ones are empty."""
        return cls.of(read_lines(run_dir.metrics), read_lines(run_dir.events))

    @classmethod
    def of(cls, rows: Iterable[Row], events: Iterable[Row]) -> Self:
        """From all rows and events that the attempts have written, in the order of the files."""
        events = list(events)
        starts = {e["attempt"]: e["nimg"] for e in events if e["event"] in BEGINNINGS}
        placed = [event for event in events if "attempt" in event and "nimg" in event]
        return cls(effective(rows, starts), effective(placed, starts))

    def series(self, name: str) -> list[tuple[int, float]]:
        """(nimg, value) wherever the metric was logged and finite."""
        return [(row["nimg"], row[name]) for row in self.rows if row.get(name) is not None]


def effective(lines: Iterable[Row], starts: Mapping[int, int]) -> list[Row]:
    """The lines that are part of the run as its last attempt has it, by position.

    Args:
        lines: each with its `attempt` and its position `nimg`.
        starts: the position that an attempt started from. Where it is unknown, the attempt's first
            line decides: older lines before it stay.
    """
    lines = list(lines)
    kept: list[Row] = []
    limit = math.inf
    for attempt in sorted({*starts, *(line["attempt"] for line in lines)}, reverse=True):
        mine = [line for line in lines if line["attempt"] == attempt]
        kept += [line for line in mine if line["nimg"] <= limit]
        first = min((line["nimg"] for line in mine), default=math.inf)
        limit = min(limit, starts.get(attempt, first - 1))
    # Stable, so that lines at one position stay in the order in which they were written; older
    # attempts come first there.
    return sorted(kept, key=lambda line: (line["nimg"], line["attempt"]))
