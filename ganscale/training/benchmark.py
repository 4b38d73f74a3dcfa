"""How fast a configuration trains on one device: the training loop itself, for some seconds.

What is measured is what a run would log about itself, data path and averages included. There is no
second loop that could be faster than the real one. A comparison measures the ways in which the
device can run the same configuration in turns, so that what else the machine does meanwhile meets
all of them alike.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import train
from ganscale.training.memory import device_memory_gib
from ganscale.training.precision import Precision
from ganscale.training.stopping import StopRequest
from ganscale.world import World, process_group

_MIN_STEPS_IN_A_ROW = 10
_WARM_UP_ROWS = 2
"""Kernels are chosen, caches filled, compiled code made."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class TrainingSpeed:
    """What the rows of a short run say, from the third on."""

    precision: str
    batch_size: int
    images_per_second: float
    """Median over rows of ten steps or a few more; of real images, each of which is in one step."""
    parts: dict[str, float]
    """Mean seconds of a step's parts: data_wait, discriminator, generator, ..."""
    peak_memory_gib: float | None
    """Of the GPU; None on the CPU."""
    device_memory_gib: float | None
    """All that the GPU has; None on the CPU."""
    num_rows: int


@dataclass(frozen=True)
class Variant:
    """A way to run a configuration."""

    name: str
    changes: Mapping[str, Any]
    """Dotted names of settings and the values that make this variant."""


CUDA_VARIANTS = (
    Variant("launched", {"training.cuda_graphs": "off", "training.compile": "off"}),
    Variant("captured", {"training.cuda_graphs": "on", "training.compile": "off"}),
    Variant("captured, compiled", {"training.cuda_graphs": "on", "training.compile": "on"}),
)


@dataclass
class VariantSpeeds:
    """What the rounds of a comparison measured of one variant."""

    variant: Variant
    images_per_second: list[float] = field(default_factory=list)
    """One value a round, unless there is an `obstacle`."""
    ratios: list[float] = field(default_factory=list)
    """Of these to the first variant's in the same round; empty where that one has none."""
    last: TrainingSpeed | None = None
    """All that the last round measured."""
    obstacle: str = ""
    """Why it could not be measured, or cannot be."""

    def summary(self) -> dict[str, Any]:
        """As JSON has it: every round's value, medians, and the parts of a step in seconds."""
        is_measured = bool(self.images_per_second)
        return {
            "variant": self.variant.name,
            "changes": dict(self.variant.changes),
            "images_per_second": statistics.median(self.images_per_second) if is_measured else None,
            "ratio": statistics.median(self.ratios) if self.ratios else None,
            "rounds": self.images_per_second,
            "parts": self.last.parts if self.last else {},
            "peak_memory_gib": self.last.peak_memory_gib if self.last else None,
            "obstacle": self.obstacle,
        }


def speed_variants(config: Config, device: torch.device) -> list[Variant]:
    """The ways in which `device` can run the configuration, the one to compare with first.

    On CUDA steps that are launched kernel by kernel, captured, and captured with compiled kernels;
    on the CPU one thread and all of the machine's, each with compiled kernels as well.
    """
    if device.type == "cuda":
        return list(CUDA_VARIANTS)
    # Those that this process may run on, which in a container may be fewer than there are.
    num_cores = len(os.sched_getaffinity(0))
    names = {1: "one thread"} | ({num_cores: f"{num_cores} threads"} if num_cores > 1 else {})
    return [
        Variant(
            f"{name}, compiled" if compiled == "on" else name,
            {"launch.threads_per_worker": num_threads, "training.compile": compiled},
        )
        for compiled in ("off", "on")
        for num_threads, name in names.items()
    ]


def compare_variants(
    config: Config,
    world: World,
    variants: Sequence[Variant],
    *,
    seconds: float,
    rounds: int,
    report: Callable[[str], None] = lambda text: None,
) -> list[VariantSpeeds]:
    """Measure all variants for `seconds` each, one after the other, and that `rounds` times.

    A variant that the configuration rules out, or that fails, is left out from then on and says
    why. `report` is told what is being measured.
    """
    results = [VariantSpeeds(variant) for variant in variants]
    for number in range(1, rounds + 1):
        reference: float | None = None
        for place, result in enumerate(results):
            if result.obstacle:
                continue
            report(f"round {number} of {rounds}: {result.variant.name}")
            try:
                changed = config.with_changes(result.variant.changes)
                result.last = bench_training(changed, world, seconds=seconds)
            except ConfigError as error:  # such as a machine without a compiler
                result.obstacle = str(error)
                continue
            # Whatever a variant meets, such as no memory or no compiler, is a result of its own and
            # no reason to lose those of the others.
            except Exception as error:
                traceback.print_exc()
                result.obstacle = f"{type(error).__name__}: {error}".split("\n")[0][:300]
                continue
            speed = result.last.images_per_second
            result.images_per_second.append(speed)
            reference = speed if place == 0 else reference
            if reference is not None:
                result.ratios.append(speed / reference)
    return results


def bench_training(config: Config, world: World, *, seconds: float) -> TrainingSpeed:
    """Train for `seconds`, or longer if thirty steps take longer, in a folder that is deleted.

    Checkpoints, pictures and W&B are left out. The time counts from the start of training, but
    what comes before the first step, and compiling, are not in what is measured: of the rows of
    about ten steps the first two are left out. Raises `GanscaleError` if the device is too small.
    """
    kimg = _steps_in_a_row(config) * config.training.batch_size / 1000
    with tempfile.TemporaryDirectory() as folder:
        # What is done between steps is put off beyond any run: only the steps are measured.
        config = config.with_changes(
            {
                "name": "bench",
                "storage": folder,
                "checkpoint.location": None,
                "checkpoint.every_kimg": 1e9,
                "checkpoint.snapshot_every_kimg": 1e9,
                "checkpoint.keep_best": 0,
                "checkpoint.best_metric": "metrics/diversity",
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
        _forget_earlier_runs(world)
        clock.start()
        try:
            with process_group(world, timeout_seconds=config.launch.timeout_seconds):
                train(config, world, stop)
        finally:
            ended.set()
            clock.join()
        return _summary(config, world, read_lines(metrics)[_WARM_UP_ROWS:])


def _steps_in_a_row(config: Config) -> int:
    """At least ten, and whole cycles of the generator's turns and of lazy penalties.

    Otherwise some rows would have more of the costly steps than others, and their median would be
    the speed of neither.
    """
    cycle = math.lcm(config.training.discriminator_steps, config.penalty.interval)
    return cycle * math.ceil(_MIN_STEPS_IN_A_ROW / cycle)


def _forget_earlier_runs(world: World) -> None:
    """Make the measurement one of a fresh process, as far as memory goes."""
    # Networks of an earlier run are in cycles of references; they would count as this one's memory.
    gc.collect()
    if world.device != "cpu":
        torch.cuda.reset_peak_memory_stats()


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
        device_memory_gib=device_memory_gib(world),
        num_rows=len(rows),
    )
