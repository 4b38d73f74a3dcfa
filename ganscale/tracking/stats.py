"""Means of training statistics between two log rows, accumulated on the device.

Adding needs no host synchronisation, and a phase need not have every statistic. `averages` makes
one all-reduce and one transfer, however many statistics there are. Unfinished sums are part of a
checkpoint, so a resumed run logs the same rows as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunningMeans"]


class RunningMeans:
    """Sums of named scalars over steps, in float64.

    Args:
        names: the statistics, fixed at the start.
        device: where the scalars come from.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._counts = dict.fromkeys(names, 0)
        self.num_steps = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add what a phase has of the statistics, each of shape ()."""
        zero = torch.zeros((), dtype=torch.float64, device=self._sums.device)
        self._sums += torch.stack([values.get(name, zero).double() for name in self.names])
        for name in values:
            self._counts[name] += 1

    def averages(
        self, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int
    ) -> dict[str, float]:
        """Means over steps and ranks since the last call, of what was added; starts anew."""
        # Counts are the same on all ranks, since all run the same phases; only sums are exchanged.
        totals = (sum_over_ranks(self._sums) / world_size).tolist()
        sums = zip(self.names, totals, strict=True)
        means = {name: total / self._counts[name] for name, total in sums if self._counts[name]}
        self._sums.zero_()
        self._counts = dict.fromkeys(self.names, 0)
        self.num_steps = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """This rank's unfinished sums."""
        return {
            "sums": dict(zip(self.names, self._sums.tolist(), strict=True)),
            "counts": dict(self._counts),
            "num_steps": self.num_steps,
        }

    def load_state_dict(
        self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int
    ) -> None:
        """Continue from the sums of all ranks. Another number of ranks shares them evenly."""
        # With the same number each takes its own back: then even the rounding of the row is that of
        # a run that was not interrupted.
        if len(states) == world_size:
            sums = states[rank]["sums"]
        else:
            sums = {
                name: sum(s["sums"].get(name, 0.0) for s in states) / len(states)
                for name in self.names
            }
        self._sums.copy_(torch.tensor([sums.get(n, 0.0) for n in self.names], dtype=torch.float64))
        self._counts = {name: states[0]["counts"].get(name, 0) for name in self.names}
        self.num_steps = states[0]["num_steps"]
