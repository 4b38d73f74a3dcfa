"""What each worker's process takes: processor, memory, and its wait for data.

wandb measures the process that started it, which is rank 0's; its way to hear of several processes
(mode "shared") neither works offline nor goes on with a run that was resumed. So every worker
measures itself when a row is due, and rank 0 logs all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch

__all__ = ["WorkerFigures", "merged"]

_MAX_WORKERS_NAMED = 16
"""More would make rows long; their times still count in the means."""
_OWN = ("data_wait_seconds", "cpu_percent", "memory_gib", "gpu_memory_gib")


class WorkerFigures:
    """This process's figures since the last call of `measure`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()

    def measure(self, part_seconds: Mapping[str, float]) -> dict[str, float]:
        """The times of a step's parts, and what the process takes; 100 % is one core."""
        figures = {f"{part}_seconds": seconds for part, seconds in part_seconds.items()}
        figures["cpu_percent"] = self._process.cpu_percent()
        figures["memory_gib"] = self._process.memory_info().rss / 2**30
        if self._device.type == "cuda":
            figures["gpu_memory_gib"] = torch.cuda.memory_reserved(self._device) / 2**30
        return figures


def merged(workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Columns of a row from every rank's figures: means of times, and each worker's own figures."""
    names = dict.fromkeys(name for figures in workers for name in figures)
    row = {
        f"time/{name}": sum(figures.get(name, 0.0) for figures in workers) / len(workers)
        for name in names
        if name.endswith("_seconds")
    }
    for rank, figures in enumerate(workers[:_MAX_WORKERS_NAMED]):
        row |= {f"workers/{rank}/{name}": figures[name] for name in _OWN if name in figures}
    return row
