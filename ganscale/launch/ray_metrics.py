"""Figures of a run as Ray metrics, which Prometheus collects from the nodes of a cluster.

A sink like the others: what a row or an event says, a gauge shows. Ray puts `ray_` before the
names and adds where the worker is. Ages are left to Prometheus (`time() - ray_ganscale_...`), so
that they grow when training hangs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Gauge

from ganscale.tracking.sinks import FAULTS, FaultCounts, NullSink, Row

GAUGES: dict[str, tuple[str, str | None]] = {
    "step": ("Global batches done", None),
    "position_kimg": ("Thousands of real images seen", None),
    "length_kimg": ("Thousands of real images that the run is to see", None),
    "workers": ("Workers in the group", None),
    "images_per_second": ("Real images a second, samples and evaluations left out", None),
    "part_seconds": ("Seconds a step takes for a part, mean over workers", "part"),
    "worker_data_wait_seconds": ("Seconds a step waits for data", "rank"),
    "worker_cpu_percent": ("Processor time, 100 a core", "rank"),
    "worker_memory_gib": ("Resident memory", "rank"),
    "worker_gpu_memory_gib": ("GPU memory that torch holds", "rank"),
    "loss": ("Loss, mean since the last row", "player"),
    "grad_norm": ("Norm of the gradients, mean since the last row", "player"),
    "loss_scale": ("Scale of the loss under fp16", "player"),
    "skipped_steps": ("Steps left out for gradients that were not finite", "player"),
    "metric": ("The last measured value", "name"),
    "faults": ("Faults of the run in all of its attempts", "fault"),
    "row_unix_seconds": ("When the last row was logged", None),
    "checkpoint_unix_seconds": ("When the last checkpoint became durable", None),
}
"""What each is, and the tag by which it differs besides `run`."""

_FROM_ROW = (
    (r"step", "step"),
    (r"time/images_per_second", "images_per_second"),
    (r"time/unix", "row_unix_seconds"),
    (r"time/(\w+)_seconds", "part_seconds"),
    (r"workers/(\d+)/(data_wait_seconds|cpu_percent|memory_gib|gpu_memory_gib)", "worker_"),
    (r"train/loss_scale_(\w+)", "loss_scale"),
    (r"train/skips_(\w+)", "skipped_steps"),
    (r"train/grad_norm_(\w+)", "grad_norm"),
    (r"train/loss_([A-Z])", "loss"),
    (r"metrics/(\w+)", "metric"),
)
"""Names of columns, and the gauge that shows them: the first that fits."""


def prometheus_names() -> set[str]:
    """What Prometheus calls the gauges."""
    return {f"ray_ganscale_{name}" for name in GAUGES}


class RayMetrics(NullSink):
    """The gauges of a run. Made on rank 0, in a Ray worker.

    Args:
        run: its name.
        total_nimg: its length.
    """

    def __init__(self, run: str, total_nimg: int) -> None:
        self._run = run
        self._faults = FaultCounts()
        self._gauges = {
            name: Gauge(f"ganscale_{name}", text, ("run", tag) if tag else ("run",))
            for name, (text, tag) in GAUGES.items()
        }
        self._values: dict[tuple[str, str | None], float] = {}
        self._set("length_kimg", total_nimg / 1000)
        self._show()

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """Take up the counts of faults and the last checkpoint's time."""
        for event in events:
            self._note(event)
        for fault in FAULTS:
            self._set("faults", self._faults[fault], fault)
        self._show()

    def log(self, row: Row) -> None:
        """Show the row."""
        self._set("position_kimg", row["nimg"] / 1000)
        for name, value in row.items():
            for pattern, gauge in _FROM_ROW:
                if found := re.fullmatch(pattern, name):
                    full_name = gauge + found[2] if gauge == "worker_" else gauge
                    self._set(full_name, value, found[1] if found.re.groups else None)
                    break
        self._show()

    def event(self, event: Row) -> None:
        """Show what an event changes."""
        if self._note(event):
            self._set("faults", self._faults[event["event"]], event["event"])
        self._show()

    def _note(self, event: Mapping[str, Any]) -> bool:
        if event["event"] == "checkpoint":
            self._set("checkpoint_unix_seconds", event["time"])
        if "world_size" in event:
            self._set("workers", event["world_size"])
        return self._faults.add(event)

    def _set(self, gauge: str, value: float, tag: str | None = None) -> None:
        """A value that is not finite is not shown; the last one stays."""
        if math.isfinite(value):
            self._values[gauge, tag] = value

    def _show(self) -> None:
        """Set all gauges, also those that have not changed.

        Ray drops what was set before it had found the node's agent, which on a busy machine takes a
        while, and some of these change only once in a run.
        """
        # A copy, since events come from other threads than rows do.
        for (gauge, tag), value in self._values.copy().items():
            _, name = GAUGES[gauge]
            tags = {"run": self._run}
            if name is not None:
                assert tag is not None
                tags[name] = tag
            self._gauges[gauge].set(value, tags=tags)
