"""Means of training statistics between two log rows, accumulated on the device.

Adding costs no host sync, and a phase need not have every statistic; `averages` makes one
all-reduce and one transfer. A row is logged with every checkpoint, so that no unfinished sums need
saving: a resumed run logs the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
        totals = (sum_over_ranks(self._sums) / world_size).tolist()
        found = zip(self.names, totals, strict=True)
        means = {name: total / self._counts[name] for name, total in found if self._counts[name]}
        self._sums.zero_()
        self._counts = dict.fromkeys(self.names, 0)
        self.num_steps = 0
        return means
