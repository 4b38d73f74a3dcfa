"""What a worker logs: one line each, with the run, the rank and the step.

    2026-11-25 17:40:02,123 WARNING run=r3gan rank=3 step=1250 stall: {"ranks": [2], ...}

Where workers have logs of their own, as under Ray, `to_stderr` is called once in each. Elsewhere
nothing is shown, since the console shows the same from the run's files.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

from ganscale.tracking.sinks import WRONG

_FORMAT = "%(asctime)s %(levelname)s run=%(run)s rank=%(rank)s step=%(step)s %(message)s"
_BRIEF = ("train/loss_D", "train/loss_G", "time/images_per_second", "time/data_wait_seconds")

_logger = logging.getLogger("ganscale")
_logger.addHandler(logging.NullHandler())


def to_stderr(run: str, rank: int) -> None:
    """Show what this process logs, and its warnings, on standard error."""
    handler = logging.StreamHandler()
    defaults = {"run": run, "rank": rank, "step": "-"}
    handler.setFormatter(logging.Formatter(_FORMAT, defaults=defaults))
    _logger.handlers = [handler]
    _logger.setLevel(logging.INFO)
    _logger.propagate = False  # handlers of the root logger would show it a second time

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        _logger.warning("%s: %s", category.__name__, message)

    warnings.showwarning = show


def log_event(event: Mapping[str, Any], run: str, rank: int) -> None:
    """Log an event with its fields; one of something wrong is a warning."""
    kind = event["event"]
    fields = {k: v for k, v in event.items() if k not in ("event", "step")}
    level = logging.WARNING if kind in WRONG else logging.INFO
    place = {"run": run, "rank": rank, "step": event["step"]}
    _logger.log(level, "%s: %s", kind, json.dumps(fields, default=str), extra=place)


def log_row(row: Mapping[str, float], run: str, rank: int) -> None:
    """Log the most important columns of a row."""
    figures = " ".join(f"{name}={row[name]:.5g}" for name in _BRIEF if name in row)
    place = {"run": run, "rank": rank, "step": int(row["step"])}
    _logger.info("nimg=%d %s", row["nimg"], figures, extra=place)
