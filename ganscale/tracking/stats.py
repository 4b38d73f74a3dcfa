"""Means of training statistics between two log rows, accumulated on the device.

Adding a step costs no host sync; `averages` makes one all-reduce and one transfer. A row is logged
with every checkpoint, so that no unfinished sums need saving: a resumed run logs the same rows.
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
        self.num_steps = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars, each of shape ()."""
        self._sums += torch.stack([values[name].double() for name in self.names])
        self.num_steps += 1

    def averages(
        self, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int
    ) -> dict[str, float]:
        """Means over steps and ranks since the last call; starts anew."""
        total = sum_over_ranks(self._sums) / (world_size * max(self.num_steps, 1))
        self._sums.zero_()
        self.num_steps = 0
        return dict(zip(self.names, total.tolist(), strict=True))
