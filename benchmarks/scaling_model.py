"""A model of images/s on 1 to 1,024 GPUs; docs/explanation/scaling.md has its assumptions.

Measured are the seconds of a step on one H100 (replayed as a graph, without other ranks), and here
on one core the seconds that the input thread needs for a row of random numbers. Counted, by taking
a step of each preset on the CPU, are the bytes of gradients and the all-reduces of batch statistics
with their sizes. Assumed are the links and the latencies. Everything else follows:

    step(N)  = max(gpu + gradients(N) + statistics(N), inputs(N))
    images/s = N * batch / step(N)

Nothing is overlapped: gradients are taken to travel after the backward, though
DistributedDataParallel sends those of the last layers while it still computes the first.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ganscale.config import Config, load_config
from ganscale.data.building import build_shards
from ganscale.data.sources import SourceSpec
from ganscale.generation.latents import draw_noise
from ganscale.models import build_discriminator, build_generator
from ganscale.training.build import load_shards
from ganscale.training.loop import Trainer
from ganscale.training.step_inputs import StepContext
from ganscale.training.steps import TrainingMethod
from ganscale.world import World, process_group

NUM_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BYTES_PER_NUMBER = 4  # gradients and statistics are fp32
_NUM_TRIALS = 50


@dataclass(frozen=True)
class Links:
    """What connects the GPUs, and what it is taken to deliver."""

    gpus_per_node: int = 8
    nvlink_bytes: float = 450e9
    """A second and direction of one GPU: NVLink 4 has 900 GB/s in both together."""
    network_bytes: float = 50e9
    """A second and direction of one GPU's adapter: 400 Gb/s InfiniBand."""
    efficiency: float = 0.8
    """Share of a link's rate that a large all-reduce reaches."""
    launch_seconds: float = 20e-6
    """Of any all-reduce, however small, among GPUs of one node."""
    hop_seconds: float = 5e-6
    """Of one message between nodes; a small all-reduce needs 2 log2(nodes) of them."""

    def all_reduce_seconds(self, num_bytes: float, num_gpus: int) -> float:
        """A ring's transfers, 2 (N - 1) / N of the bytes over the slowest link, and latency."""
        if num_gpus == 1:
            return 0.0
        num_nodes = math.ceil(num_gpus / self.gpus_per_node)
        rate = self.nvlink_bytes if num_nodes == 1 else self.network_bytes
        transfer = 2 * (num_gpus - 1) / num_gpus * num_bytes / (rate * self.efficiency)
        return transfer + self.launch_seconds + 2 * math.log2(num_nodes) * self.hop_seconds


@dataclass(frozen=True)
class Measurement:
    """Of one preset on one H100, replayed as a graph."""

    preset: str
    batch_size: int
    images_per_second: float
    changes: tuple[str, ...] = ()
    """Overrides of the preset under which this was measured, besides the batch size."""

    @property
    def gpu_seconds(self) -> float:
        """A step's, in the mean over lazy penalties and the generator's turns."""
        return self.batch_size / self.images_per_second


MEASURED = (
    Measurement("dcgan-cifar10", 128, 77_034),
    Measurement("dcgan-cifar10", 512, 187_890),
    Measurement("sngan-cifar10", 64, 10_010),
    Measurement("biggan-cifar10", 50, 4_088),
    Measurement("biggan-cifar10", 256, 6_424),
    Measurement("stylegan2-ada-cifar10", 64, 906),
    Measurement("r3gan-cifar10", 64, 559),
    Measurement("r3gan-cifar10", 256, 589),
    Measurement("r3gan-small", 256, 1_927),
)
"""On one H100 (80 GB) with torch 2.11; images/s of the step replayed as one CUDA graph."""


@dataclass(frozen=True)
class AllReduce:
    """One kind of the small all-reduces of a step."""

    num_bytes: int
    """Among one rank."""
    grows: bool
    """Whether there is a row for each rank, as in the table of means, squares and counts."""
    count: float
    """How many there are in a step, in the mean over the generator's turns."""

    def bytes_among(self, num_gpus: int) -> int:
        """What is exchanged among so many ranks."""
        return self.num_bytes * (num_gpus if self.grows else 1)


@dataclass(frozen=True)
class Exchange:
    """What the ranks of a preset exchange in a step, and prepare on the host."""

    gradient_bytes: dict[str, int]
    """Of each player, G and D."""
    statistics: tuple[AllReduce, ...]
    """Of batch statistics, ADA and LeCam; all of them are waited for one by one."""
    row_seconds: float
    """Of one core, for the random numbers of one image of the global batch."""

    def gradient_seconds(self, links: Links, num_gpus: int, discriminator_steps: int) -> float:
        """All-reduces of D's gradients in each step, and of G's where it has its turn."""
        seconds = {
            letter: links.all_reduce_seconds(num_bytes, num_gpus)
            for letter, num_bytes in self.gradient_bytes.items()
        }
        return seconds["D"] + seconds["G"] / discriminator_steps

    def statistics_seconds(self, links: Links, num_gpus: int) -> float:
        """All all-reduces of batch statistics in a step."""
        return sum(
            each.count * links.all_reduce_seconds(each.bytes_among(num_gpus), num_gpus)
            for each in self.statistics
        )


@dataclass(frozen=True)
class Step:
    """The model's step on some GPUs, in seconds."""

    gpu: float
    gradients: float
    statistics: float
    inputs: float

    @property
    def seconds(self) -> float:
        return max(self.gpu + self.gradients + self.statistics, self.inputs)


def modelled_step(
    measurement: Measurement, exchange: Exchange, num_gpus: int, links: Links, turns: int
) -> Step:
    """A step on so many GPUs with the measured batch on each; `turns` are D's steps a turn of G."""
    return Step(
        gpu=measurement.gpu_seconds,
        gradients=exchange.gradient_seconds(links, num_gpus, turns),
        statistics=exchange.statistics_seconds(links, num_gpus),
        inputs=exchange.row_seconds * measurement.batch_size * num_gpus,
    )


@cache
def exchange_of(preset: str) -> Exchange:
    """Count what a preset exchanges: parameters exactly, all-reduces by taking steps on the CPU."""
    config = load_config(preset, [])
    spec = config.generator_spec
    networks = {"G": build_generator(spec), "D": build_discriminator(spec)}
    sizes = {
        letter: BYTES_PER_NUMBER * sum(p.numel() for p in network.parameters())
        for letter, network in networks.items()
    }
    with tempfile.TemporaryDirectory() as folder, process_group(World()):
        trainer = _small_trainer(config, Path(folder))
        with closing(trainer):
            return Exchange(sizes, _counted_statistics(trainer), _row_seconds(config, trainer))


def _small_trainer(config: Config, folder: Path) -> Trainer:
    """A trainer of the preset's networks at their full width, on few images."""
    build_shards(SourceSpec("procedural"), folder / "shards", num_shards=2, limit=64)
    changes = {
        "data.shards": str(folder / "shards"),
        "storage": str(folder),
        "training.batch_size": 2,
        "training.precision": "fp32",
        "launch.num_workers": 1,
        "tracking.wandb": "disabled",
    }
    config = config.with_changes(changes)
    return Trainer(config, World(), load_shards(config))


def _counted_statistics(trainer: Trainer) -> tuple[AllReduce, ...]:
    """All-reduces that are waited for within a step, in the mean over the generator's turns.

    Lazy penalties are left out: their steps, say every 16th, have a few more.
    """
    turns = trainer.config.training.discriminator_steps
    counts: Counter[tuple[int, bool]] = Counter()
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        # A table has two dimensions, of which the first is that of the ranks: one here.
        counts[tensor.nbytes, tensor.dim() == 2 and len(tensor) == 1] += 1
        return all_reduce(tensor, *args, **options)

    position = turns  # the steps before it are the first ones, of which one has lazy penalties
    size = trainer.config.training.batch_size
    batches = trainer.reader.batches(0, size)
    for step in range(position + turns):
        host = trainer.inputs.prepare(next(batches), step * size, step)
        if step == position:
            dist.all_reduce = counted
        try:
            trainer.step(host)
        finally:
            if step == position + turns - 1:
                dist.all_reduce = all_reduce
    batches.close()
    return tuple(AllReduce(*kind, count / turns) for kind, count in sorted(counts.items()))


def _row_seconds(config: Config, trainer: Trainer, batch_size: int = 1024) -> float:
    """Seconds that one core takes to draw one image's random numbers.

    The least of many short trials: what else the machine does can only make them longer.
    """
    method: TrainingMethod = trainer.state.method
    turns = config.training.discriminator_steps
    slots = torch.arange(8)
    torch.set_num_threads(1)
    seconds = []
    for _ in range(_NUM_TRIALS):
        began = time.perf_counter()
        for step in range(turns):
            context = StepContext(step, step, batch_size, discriminator_steps=turns)
            draws = method.draws(method.variant(context))
            draw_noise(draws, seed=0, position=step, batch_size=batch_size, slots=slots)
        seconds.append((time.perf_counter() - began) / turns / batch_size)
    return min(seconds)


def model_tables(links: Links = Links(), measured: Sequence[Measurement] = MEASURED) -> str:
    """Markdown: what is exchanged, images/s and efficiency, and where the time goes at 1,024."""
    presets = list(dict.fromkeys(measurement.preset for measurement in measured))
    lines = [
        "| preset | gradients of G / D, MB | all-reduces of statistics a step "
        "| their MB, 8 / 1,024 GPUs | random numbers of an image, us |",
        "|---|---|---|---|---|",
    ]
    for preset in presets:
        exchange = exchange_of(preset)
        count = sum(each.count for each in exchange.statistics)
        few, many = (
            sum(each.count * each.bytes_among(n) for each in exchange.statistics) for n in (8, 1024)
        )
        sizes = exchange.gradient_bytes
        lines.append(
            f"| {preset} | {sizes['G'] / 1e6:.2f} / {sizes['D'] / 1e6:.2f} "
            f"| {count:.1f} | {few / 1e6:.2f} / {many / 1e6:,.1f} "
            f"| {1e6 * exchange.row_seconds:.2f} |"
        )
    columns = "".join(f" {num_gpus:,} |" for num_gpus in NUM_GPUS)
    lines += ["", f"| preset, images a GPU |{columns}", "|---|" + "---|" * len(NUM_GPUS)]
    lines += [_speeds(measurement, links) for measurement in measured]
    lines += [
        "",
        "| preset, images a GPU | ms: GPU (measured) | gradients, 8 / 1,024 GPUs "
        "| statistics, 8 / 1,024 | inputs, 8 / 1,024 | limit at 1,024 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_shares(measurement, links) for measurement in measured]
    return "\n".join(lines)


def _steps(measurement: Measurement, links: Links) -> dict[int, Step]:
    turns = load_config(measurement.preset, []).training.discriminator_steps
    exchange = exchange_of(measurement.preset)
    return {n: modelled_step(measurement, exchange, n, links, turns) for n in NUM_GPUS}


def _speeds(measurement: Measurement, links: Links) -> str:
    cells = []
    for num_gpus, step in _steps(measurement, links).items():
        speed = num_gpus * measurement.batch_size / step.seconds
        efficiency = 100 * measurement.gpu_seconds / step.seconds
        cells.append(f" {_short(speed)} ({efficiency:.0f} %) |")
    return f"| {measurement.preset}, {measurement.batch_size} |{''.join(cells)}"


def _shares(measurement: Measurement, links: Links) -> str:
    steps = _steps(measurement, links)
    few, many = steps[8], steps[1024]

    def both(name: str) -> str:
        return f"{1000 * getattr(few, name):.2f} / {1000 * getattr(many, name):.2f}"

    parts = {name: getattr(many, name) for name in ("gpu", "gradients", "statistics")}
    limit = "inputs" if many.inputs >= sum(parts.values()) else max(parts, key=lambda n: parts[n])
    return (
        f"| {measurement.preset}, {measurement.batch_size} | {1000 * many.gpu:.2f} "
        f"| {both('gradients')} | {both('statistics')} | {both('inputs')} | {limit} |"
    )


def _short(speed: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if speed >= 10 * size:
            return f"{speed / size:,.0f} {unit}"
        if speed >= size:
            return f"{speed / size:,.1f} {unit}"
    return f"{speed:.0f}"
