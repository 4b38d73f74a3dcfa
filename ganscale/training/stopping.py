"""How a run is asked to stop, and how its training ended.

A signal handler or another thread sets a `StopRequest`; the loop sees it after a step, checkpoints
and returns. `stop_consensus` lets all ranks see it at the same step. What starts and stops runs
imports this and need not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StopReason = Literal["", "regroup", "callback", "terminated", "interrupted"]


@dataclass
class StopRequest:
    """Set from anywhere, read by the training loop."""

    reason: StopReason = ""
    is_training: bool = True
    """False while no worker trains, so that a stop leaves nothing to finish or to write."""


@dataclass(frozen=True)
class TrainResult:
    """Where `train` ended: at the end of the run, or before it because it was asked to stop."""

    nimg: int
    reason: StopReason = ""
    """Empty at the end of the run."""
    has_trained: bool = True
    """False if it was stopped before it had workers; then nothing of the run has changed."""
