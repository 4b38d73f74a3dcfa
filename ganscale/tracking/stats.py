"""What a log row has of the time since the last: means of statistics, and what workers used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

_MAX_WORKERS_NAMED = 16
"""More would make rows long; their times still count in the means."""
_OWN = ("data_wait_seconds", "cpu_percent", "memory_gib", "gpu_memory_gib")


class RunningMeans:
    """Sums of named scalars over steps, in float64, accumulated on the device.

    Adding needs no host synchronisation, and a phase need not have every statistic. `averages`
    makes one all-reduce and one transfer, however many statistics there are. Unfinished sums are
    part of a checkpoint, so a resumed run logs the same rows as one that was not interrupted.

    Args:
        names: the statistics, fixed at the start.
        device: where the scalars come from.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        # Sums and counts, on the device as well: which statistics a step has depends on its form,
        # and a captured step adds what it has by itself.
        self._totals = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self._absent, self._present = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add what a step has of the statistics, each of shape ()."""
        assert values.keys() <= set(self.names)
        absent, present = self._absent, self._present
        self._totals += torch.stack(
            [
                torch.stack([values.get(name, absent).double() for name in self.names]),
                torch.stack([present if name in values else absent for name in self.names]),
            ]
        )

    def averages(
        self, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int
    ) -> dict[str, float]:
        """Means over steps and ranks since the last call, of what was added; starts anew."""
        # All ranks take the same forms of steps, so the mean of their counts is each one's.
        sums, counts = (sum_over_ranks(self._totals) / world_size).tolist()
        means = {
            name: total / count
            for name, total, count in zip(self.names, sums, counts, strict=True)
            if count
        }
        self._totals.zero_()
        return means

    def state_dict(self) -> dict[str, Any]:
        """This rank's unfinished sums."""
        sums, counts = self._totals.tolist()
        return {
            "sums": dict(zip(self.names, sums, strict=True)),
            "counts": dict(zip(self.names, counts, strict=True)),
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
        counts = states[0]["counts"]
        rows = [[values.get(name, 0.0) for name in self.names] for values in (sums, counts)]
        self._totals.copy_(torch.tensor(rows, dtype=torch.float64))


class WorkerStats:
    """What this process uses of processor and memory since the last call of `measure`.

    wandb measures the process that started it, which is rank 0's. Its mode for several processes
    ("shared") works neither offline nor with a run that is resumed. So every worker measures itself
    when a row is due, and rank 0 logs all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call gives 0: psutil measures between two calls

    def measure(self, part_seconds: Mapping[str, float]) -> dict[str, float]:
        """The times of a step's parts, and what the process uses; 100 % is one core."""
        stats = {f"{part}_seconds": seconds for part, seconds in part_seconds.items()}
        stats["cpu_percent"] = self._process.cpu_percent()
        stats["memory_gib"] = self._process.memory_info().rss / 2**30
        if self._device.type == "cuda":
            # Reserved and not allocated: what other processes on this device cannot have.
            stats["gpu_memory_gib"] = torch.cuda.memory_reserved(self._device) / 2**30
        return stats


def worker_columns(workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Columns of a row from every rank's stats: means of times, and each worker's own stats."""
    names = dict.fromkeys(name for stats in workers for name in stats)
    row = {
        f"time/{name}": sum(stats.get(name, 0.0) for stats in workers) / len(workers)
        for name in names
        if name.endswith("_seconds")
    }
    for rank, stats in enumerate(workers[:_MAX_WORKERS_NAMED]):
        row |= {f"workers/{rank}/{name}": stats[name] for name in _OWN if name in stats}
    return row
