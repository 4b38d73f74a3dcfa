"""How fast a configuration trains on one device: the training loop itself, for some seconds."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import train
from ganscale.training.precision import Precision
from ganscale.training.stopping import StopRequest
from ganscale.world import World, process_group

__all__ = ["TrainingSpeed", "bench_training"]

_STEPS_IN_A_ROW = 10
_WARM_UP_ROWS = 2
"""Kernels are chosen, caches filled, compiled code made."""


@dataclass(frozen=True)
class TrainingSpeed:
    """What the rows of a short run say, from the third on."""

    precision: str
    batch_size: int
    images_per_second: float
    """Median over rows of ten steps; of real images, each seen once a step."""
    parts: dict[str, float]
    """Mean seconds of a step's parts: data_wait, discriminator, generator, ..."""
    peak_memory_gib: float | None
    """Of the GPU; None on the CPU."""
    num_rows: int


def bench_training(config: Config, world: World, *, seconds: float) -> TrainingSpeed | None:
    """Train for about `seconds` in a folder that is deleted; None if that was too short to say.

    Checkpoints, pictures and W&B are left out. `seconds` counts from the first step that was
    asked for, so what comes before it, and compiling, do not shorten what is measured by more
    than the first rows.
    """
    kimg = _STEPS_IN_A_ROW * config.training.batch_size / 1000
    with tempfile.TemporaryDirectory() as folder:
        config = config.with_changes(
            {
                "name": "bench",
                "storage": folder,
                "checkpoint.location": None,
                "checkpoint.every_kimg": 1e9,
                "checkpoint.snapshot_every_kimg": 1e9,
                "samples.every_kimg": 1e9,
                "samples.num_images": 1,
                "evaluation.every_kimg": 0,
                "tracking.wandb": "disabled",
                "tracking.log_every_kimg": kimg,
                "training.total_kimg": 1e9,
            }
        )
        stop = StopRequest()
        timer = threading.Timer(seconds, setattr, (stop, "reason", "interrupted"))
        if world.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        timer.start()
        try:
            with process_group(world, timeout_seconds=config.launch.timeout_seconds):
                train(config, world, stop)
        finally:
            timer.cancel()
        text = RunDirectory(config.run_dir).metrics.read_text()
    rows = [json.loads(line) for line in text.splitlines()][_WARM_UP_ROWS:]
    return _summary(config, world, rows) if rows else None


def _summary(config: Config, world: World, rows: list[dict[str, Any]]) -> TrainingSpeed:
    parts = [name for name in rows[0] if name.startswith("time/") and name.endswith("_seconds")]
    on_gpu = world.device != "cpu"
    return TrainingSpeed(
        precision=Precision.resolve(config.training.precision, world.torch_device).name,
        batch_size=config.training.batch_size,
        images_per_second=statistics.median(row["time/images_per_second"] for row in rows),
        parts={
            name.removeprefix("time/").removesuffix("_seconds"): statistics.fmean(
                row[name] for row in rows
            )
            for name in parts
        },
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        num_rows=len(rows),
    )
