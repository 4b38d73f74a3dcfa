"""Measure training with the presets on one GPU: steps launched or captured, compiled or not.

    python -m benchmarks.gpu.measure --shards data/cifar10-train --out gpu.json
    python -m benchmarks.gpu.measure --table gpu.json         # as a table of Markdown

Each line of the file is one measurement: images per second through the whole of training (reader,
random numbers, averages, rows), milliseconds by part, peak memory; and of a few profiled steps how
long the GPU stood idle, how many kernels ran, how often the host launched something and how often
it waited. One that fails is reported and the next one goes on. Needs no Ray and no W&B. The table
is the one in RESULTS.md. `ganscale bench train --compare` measures one configuration in the same
ways, in turns; `benchmarks.gpu.peers` measures other projects' steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ganscale.config import Config, load_config
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.training.benchmark import CUDA_VARIANTS, Variant, bench_training
from ganscale.training.build import load_shards
from ganscale.training.determinism import use_deterministic_kernels
from ganscale.training.loop import Trainer
from ganscale.training.step_graphs import own_stream
from ganscale.world import World, process_group

PRESETS: dict[str, list[str]] = {
    "dcgan-cifar10": [],
    "sngan-cifar10": [],
    "biggan-cifar10": [],
    "stylegan2-ada-cifar10": [],
    "r3gan-small": [],
    "r3gan-cifar10": ["training.batch_size=256"],
}
MODES = {variant.name: variant for variant in CUDA_VARIANTS}
WARM_UP_STEPS, PROFILED_STEPS = 40, 16
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> None:
    """Measure, or print a table of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", help="a shard set of 32x32 images with ten classes")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--table", type=Path, help="print this file's measurements as a table")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_lines(arguments.table)))
        return
    if not (arguments.shards and arguments.out):
        parser.error("--shards and --out, or --table")
    for preset in arguments.presets:
        for mode in arguments.modes:
            overrides = [f"data.shards={arguments.shards}", *PRESETS[preset]]
            row: dict[str, Any] = {"preset": preset, "mode": mode, "overrides": overrides[1:]}
            try:
                config = load_config(preset, overrides)
                row |= measured(config, MODES[mode], arguments.device, arguments.seconds)
            except ConfigError as error:  # such as a machine without a compiler
                row["refused"] = str(error)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def measured(config: Config, variant: Variant, device: str, seconds: float) -> dict[str, Any]:
    """What one configuration gives on a device."""
    config = config.with_changes({**variant.changes, "launch.num_workers": 1})
    world = World(device=device)
    speed = bench_training(config, world, seconds=seconds)
    row = {"device": device_name(device), "torch": torch.__version__, **asdict(speed)}
    return row | profiled(config, world)


def device_name(device: str) -> str:
    """As people know it."""
    return torch.cuda.get_device_name(device) if device != "cpu" else "CPU"


def profiled(config: Config, world: World) -> dict[str, Any]:
    """Idle share of the GPU, kernels, launches and waits a step, of some steps after a warm-up."""
    device = world.torch_device
    size = config.training.batch_size
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder, process_group(world), own_stream(device):
        use_deterministic_kernels(device)
        changes = {"storage": folder, "tracking.wandb": "disabled", "name": "profiled"}
        config = config.with_changes(changes)
        with closing(Trainer(config, world, load_shards(config))) as trainer:
            batches = trainer.reader.batches(0, size)
            with closing(trainer.inputs.ahead(batches, 0, 0)) as inputs:
                for _ in range(WARM_UP_STEPS):
                    trainer.step(next(inputs))
                _wait(device)
                with profile(activities=activities) as profiler:
                    for _ in range(PROFILED_STEPS):
                        trainer.step(next(inputs))
                    _wait(device)
    return summary(list(profiler.events() or []), PROFILED_STEPS)


def summary(events: list[Any], num_steps: int) -> dict[str, Any]:
    """Figures of a step from the profiler's events."""
    cuda = torch.autograd.DeviceType.CUDA
    kernels = sorted(
        (e.time_range.start, e.time_range.end) for e in events if e.device_type == cuda
    )
    names = Counter(e.name for e in events)
    busy, end = 0.0, -1.0
    for begin, finish in kernels:  # those that overlap count once
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    whole = end - kernels[0][0] if kernels else 0.0
    return {
        "gpu_idle_share": 1 - busy / whole if whole else None,
        "kernels_per_step": len(kernels) / num_steps,
        "launches_per_step": sum(names[name] for name in _LAUNCHES) / num_steps,
        "waits_per_step": sum(names[name] for name in _WAITS) / num_steps,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a measurement; the newest of each preset and mode."""
    newest = {(row["preset"], row["mode"]): row for row in rows}
    lines = [
        "| preset | steps | precision | batch | images/s | ms a step | its D, its G | GPU idle "
        "| launches | waits | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (preset, mode), row in newest.items():
        if "images_per_second" not in row:
            reason = row.get("refused") or row.get("error", "")
            lines.append(f"| {preset} | {mode} | {reason} | | | | | | | | |")
            continue
        idle, memory = row["gpu_idle_share"], row["peak_memory_gib"]
        # A replayed step is one part, so only launched ones tell D's time from G's.
        phases = [row["parts"].get(name) for name in ("discriminator", "generator")]
        both = ", ".join(f"{1000 * part:.1f}" for part in phases if part is not None)
        lines.append(
            f"| {preset} | {mode} | {row['precision']} | {row['batch_size']} "
            f"| {row['images_per_second']:,.0f} "
            f"| {1000 * row['batch_size'] / row['images_per_second']:.2f} | {both} "
            f"| {'' if idle is None else f'{100 * idle:.0f} %'} "
            f"| {row['launches_per_step']:.0f} | {row['waits_per_step']:.1f} "
            f"| {'' if memory is None else f'{memory:.1f} GiB'} |"
        )
    return "\n".join(lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
