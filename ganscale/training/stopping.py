"""How a run is asked to stop, and how its ranks agree on what is asked of one of them.

A signal handler or another thread sets a `StopRequest`; the loop sees it after a step, checkpoints
and returns. Ranks see it at the same step: their requests are combined once a step, in a collective
that is started before the step and read after it, so that nobody waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed as dist

StopReason = Literal["", "regroup", "terminated", "interrupted"]
# In the order of their strength: the maximum over ranks is what all do. A regroup goes on by itself
# afterwards, so a request to end outweighs it.
_REASONS: tuple[StopReason, ...] = ("", "regroup", "terminated", "interrupted")


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


@dataclass(frozen=True)
class RankRequests:
    """What one rank asks for, or all have agreed on."""

    stop: StopReason = ""
    checkpoint: bool = False


class StopConsensus:
    """All ranks' requests combined: the strongest reason to stop, a checkpoint if one asks."""

    def __init__(self) -> None:
        self._values = torch.zeros(2, dtype=torch.int64)
        self._work: dist.Work | None = None

    def propose(self, requests: RankRequests) -> None:
        """Send this rank's requests without waiting; all ranks call this before the same step."""
        values = [_REASONS.index(requests.stop), int(requests.checkpoint)]
        # On the host, so the collective needs no stream of the device and reading it does not wait
        # for one.
        self._values = torch.tensor(values, dtype=torch.int64)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, async_op=True)

    def result(self) -> RankRequests:
        """What all proposed before the step."""
        # Before the first step nothing has been proposed.
        if self._work is None:
            return RankRequests()
        self._work.wait()
        self._work = None
        stop, checkpoint = self._values.tolist()
        return RankRequests(_REASONS[stop], bool(checkpoint))
