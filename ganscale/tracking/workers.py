"""What each worker's process uses: processor, memory, and its wait for data.

wandb measures the process that started it, which is rank 0's. Its mode for several processes
("shared") works neither offline nor with a run that is resumed. So every worker measures itself
when a row is due, and rank 0 logs all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch

_MAX_WORKERS_NAMED = 16
"""More would make rows long; their times still count in the means."""
_OWN = ("data_wait_seconds", "cpu_percent", "memory_gib", "gpu_memory_gib")


class WorkerStats:
    """Measures this process since the last call of `measure`."""

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


def merged(workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
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
