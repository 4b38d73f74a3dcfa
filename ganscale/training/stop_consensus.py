"""How all ranks of a run agree on what is asked of one of them.

Their requests are combined once a step, in a collective that is started before the step and read
after it, so that nobody waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed as dist

from ganscale.training.stopping import StopReason

# In the order of their strength: the maximum over ranks is what all do. A regroup goes on by itself
# afterwards, so a request to end outweighs it.
_REASONS: tuple[StopReason, ...] = ("", "regroup", "terminated", "interrupted")


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
