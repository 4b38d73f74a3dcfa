"""How fast a configuration trains on one device: the training loop itself, for some seconds.

What is measured is what a run would log about itself, data path and averages included. There is no
second loop that could be faster than the real one.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ganscale.config import Config
from ganscale.errors import GanscaleError
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import train
from ganscale.training.memory import out_of_memory_message
from ganscale.training.precision import Precision
from ganscale.training.stopping import StopRequest
from ganscale.world import World, process_group

__all__ = ["TrainingSpeed", "bench_training"]

_STEPS_IN_A_ROW = 10
_WARM_UP_ROWS = 2
"""Kernels are chosen, caches filled, compiled code made."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class TrainingSpeed:
    """What the rows of a short run say, from the third on."""

    precision: str
    batch_size: int
    images_per_second: float
    """Median over rows of ten steps; of real images, each of which is in one step."""
    parts: dict[str, float]
    """Mean seconds of a step's parts: data_wait, discriminator, generator, ..."""
    peak_memory_gib: float | None
    """Of the GPU; None on the CPU."""
    device_memory_gib: float | None
    """All that the GPU has; None on the CPU."""
    num_rows: int


def bench_training(config: Config, world: World, *, seconds: float) -> TrainingSpeed:
    """Train for `seconds`, or longer if thirty steps take longer, in a folder that is deleted.

    Checkpoints, pictures and W&B are left out. The time counts from the start of training, but
    what comes before the first step, and compiling, are not in what is measured: of the rows of
    ten steps the first two are left out. Raises `GanscaleError` if the device is too small.
    """
    kimg = _STEPS_IN_A_ROW * config.training.batch_size / 1000
    with tempfile.TemporaryDirectory() as folder:
        # What is done between steps is put off beyond any run: only the steps are measured.
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
        metrics = RunDirectory(config.run_dir).metrics
        stop, ended = StopRequest(), threading.Event()

        def stop_when_measured() -> None:
            ended.wait(seconds)
            while not (ended.is_set() or read_lines(metrics)[_WARM_UP_ROWS:]):
                ended.wait(_POLL_SECONDS)
            stop.reason = "interrupted"

        clock = threading.Thread(target=stop_when_measured, name="bench")
        if world.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        clock.start()
        try:
            with process_group(world, timeout_seconds=config.launch.timeout_seconds):
                train(config, world, stop)
        except torch.OutOfMemoryError:
            message = out_of_memory_message(config, world.device, _device_memory_gib(world))
            raise GanscaleError(message) from None
        finally:
            ended.set()
            clock.join()
        return _summary(config, world, read_lines(metrics)[_WARM_UP_ROWS:])


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
        device_memory_gib=_device_memory_gib(world),
        num_rows=len(rows),
    )


def _device_memory_gib(world: World) -> float | None:
    if world.device == "cpu":
        return None
    return float(torch.cuda.get_device_properties(world.torch_device).total_memory / 2**30)
