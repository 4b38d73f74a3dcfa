"""Other projects' own training steps beside ganscale's, on one device, in one run.

    git clone https://github.com/brownvc/R3GAN peers/R3GAN
    git clone https://github.com/POSTECH-CVLab/PyTorch-StudioGAN peers/StudioGAN
    python -m benchmarks.gpu.peers --r3gan peers/R3GAN --studiogan peers/StudioGAN --out peers.json
    python -m benchmarks.gpu.peers --table peers.json           # as a table of Markdown

The peers' code is imported from the given folders when this is run; none of it is part of this
repository. Each trains the networks of its own configuration with its own step (losses, penalties,
augmentation, updates and averages) on synthetic batches of CIFAR-10's shape that are ready in
page-locked memory, so no peer waits for its data loader. ganscale is at no advantage there: it runs
the whole of `ganscale bench train` on synthetic images, reader, rows and averages included, with
the peer's batch size and number of discriminator steps. Both count the real images that enter D.

Every measurement is a process of its own with a time limit, and a line of JSON in the file; one
that fails or takes too long leaves its reason there, and the next one goes on. Custom CUDA kernels
of a peer are compiled where there is a compiler (`nvcc` and ninja); elsewhere, as on a CPU, the
peer's own reference implementations are measured, and the line says so. `--tiny` narrows the
networks and batches so that the script can be tried on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.peer_steps import PEERS, TINY_BATCH, PeerStep, measured_step
from ganscale.json_lines import read_lines

NUM_IMAGES = 2_000
"""Synthetic images in ganscale's shard set."""


@dataclass(frozen=True)
class Section:
    """One model as both projects have it."""

    peer: str
    """Whose folder: a key of `PEERS`."""
    configuration: str
    """The peer's name of it."""
    preset: str
    overrides: tuple[str, ...] = ()
    """What makes ganscale's preset the same model as the peer's configuration."""


SECTIONS = {
    "r3gan": Section("r3gan", "CIFAR10", "r3gan-cifar10"),
    "sngan": Section("studiogan", "SNGAN", "sngan-cifar10", ("model.num_classes=10",)),
    "biggan": Section("studiogan", "BigGAN", "biggan-cifar10"),
    "stylegan2-ada": Section("studiogan", "StyleGAN2-ADA", "stylegan2-ada-cifar10"),
}
TINY: dict[str, list[str]] = {
    "r3gan": ["model.base_channels=32", "training.precision=fp32"],
    "sngan": ["model.base_channels=16"],
    "biggan": ["model.base_channels=8"],
    "stylegan2-ada": ["model.base_channels=32", "penalty.interval=2"],
}
"""ganscale's side of `--tiny`; the peers' is in `peer_steps`."""


def main() -> None:
    """Measure, or print a table of what was measured."""
    arguments = _parser().parse_args()
    if arguments.measure:
        _measure_here(arguments)
        return
    if arguments.table:
        print(table(read_lines(arguments.table)))
        return
    if not arguments.out:
        _parser().error("--out, or --table")
    folders = {name: getattr(arguments, name) for name in PEERS if getattr(arguments, name)}
    sections = [name for name in arguments.sections if SECTIONS[name].peer in folders]
    if not sections:
        _parser().error("--r3gan or --studiogan: nothing to compare with")
    with tempfile.TemporaryDirectory() as scratch:
        shards = _synthetic_shards(Path(scratch))
        for number in range(arguments.rounds):
            for name in sections:
                _compare(name, folders[SECTIONS[name].peer], shards, number, arguments)
    print(table(read_lines(arguments.out)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, help=f"a clone of {PEERS[name].url}")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--table", type=Path, help="print this file's measurements as a table")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--limit", type=float, default=300, help="seconds until one is given up")
    parser.add_argument("--rounds", type=int, default=1, help="peer and ganscale, in turns")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--batch", type=int, help="images a step, in place of the peer's own")
    parser.add_argument("--tiny", action="store_true", help="to try the script on a CPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in a process started by this one
    return parser


def _synthetic_shards(folder: Path) -> Path:
    from ganscale.data.building import build_shards
    from ganscale.data.sources import SourceSpec

    shards = folder / "synthetic"
    build_shards(SourceSpec("procedural"), shards, num_shards=16, limit=NUM_IMAGES)
    return shards


def _compare(
    name: str, folder: Path, shards: Path, number: int, arguments: argparse.Namespace
) -> None:
    """Measure the peer, then ganscale with the peer's batch size and discriminator steps."""
    section = SECTIONS[name]
    common = {"section": name, "round": number, "tiny": arguments.tiny}
    task = {
        "side": section.peer,
        "name": name,
        "folder": str(folder.absolute()),
        "configuration": section.configuration,
    }
    peer = _in_a_process(task, arguments)
    _write(arguments.out, {**common, "side": section.peer, **peer})
    overrides = [f"data.shards={shards}", *section.overrides]
    overrides += TINY[name] if arguments.tiny else []
    # Of a peer that could not be built neither is known; ganscale's are then the preset's.
    batch_size = peer.get("batch_size") or arguments.batch or (TINY_BATCH if arguments.tiny else 0)
    if batch_size:
        overrides.append(f"training.batch_size={batch_size}")
    if "discriminator_steps" in peer:
        overrides.append(f"training.discriminator_steps={peer['discriminator_steps']}")
    task = {"side": "ganscale", "name": name, "preset": section.preset, "overrides": overrides}
    ours = _in_a_process(task, arguments)
    _write(arguments.out, {**common, "side": "ganscale", "overrides": overrides[1:], **ours})


def _in_a_process(task: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measured, or the reason why it measured nothing."""
    with tempfile.TemporaryDirectory() as folder:
        task = {**task, "result": str(Path(folder) / "result.json")}
        command = [sys.executable, "-m", "benchmarks.gpu.peers", "--measure", json.dumps(task)]
        command += ["--seconds", str(arguments.seconds), "--device", arguments.device]
        command += ["--batch", str(arguments.batch)] if arguments.batch else []
        command += ["--tiny"] if arguments.tiny else []
        try:
            # Peers print a good deal; standard output is for the measurements.
            code = subprocess.run(command, stdout=sys.stderr, timeout=arguments.limit).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {arguments.limit:g} s"}
        result = Path(task["result"])
        if not result.is_file():
            return {"error": f"its process ended with exit code {code}"}
        return dict(json.loads(result.read_text()))


def _measure_here(arguments: argparse.Namespace) -> None:
    task = json.loads(arguments.measure)
    try:
        measure = _measure_ganscale if task["side"] == "ganscale" else _measure_peer
        result = measure(task, arguments)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    Path(task["result"]).write_text(json.dumps(result))


def _measure_peer(task: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    peer = PEERS[task["side"]]
    step: PeerStep = peer.build(
        Path(task["folder"]),
        task["configuration"],
        arguments.device,
        batch_size=arguments.batch,
        tiny=arguments.tiny,
    )
    return measured_step(step, arguments.device, seconds=arguments.seconds)


def _measure_ganscale(task: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.gpu.measure import device_name
    from ganscale.config import load_config
    from ganscale.models import build_discriminator, build_generator
    from ganscale.training.benchmark import bench_training
    from ganscale.world import World

    config = load_config(task["preset"], task["overrides"]).with_changes({"launch.num_workers": 1})
    speed = bench_training(config, World(device=arguments.device), seconds=arguments.seconds)
    networks = [build_generator(config.generator_spec), build_discriminator(config.generator_spec)]
    return {
        "images_per_second": speed.images_per_second,
        "batch_size": speed.batch_size,
        "discriminator_steps": config.training.discriminator_steps,
        "precision": speed.precision,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in networks],
        "peak_memory_gib": speed.peak_memory_gib,
        "device": device_name(arguments.device),
        "torch": torch.__version__,
    }


def _write(file: Path, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a model: medians over rounds of both sides, and their ratio."""
    import statistics

    lines = [
        "| model | peer | precision, parameters of G / D | batch x D steps | peer, images/s "
        "| ganscale, images/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, section in SECTIONS.items():
        sides = []
        for side in (section.peer, "ganscale"):
            own = [row for row in rows if row["section"] == name and row["side"] == side]
            sides.append([row for row in own if "images_per_second" in row] or own[-1:])
        if not all(sides):
            continue
        medians = [
            statistics.median(row["images_per_second"] for row in side)
            if "images_per_second" in side[0]
            else None
            for side in sides
        ]
        peer, ours = (side[-1] for side in sides)
        cells = [
            f"{median:,.0f}" if median is not None else row.get("error", "")
            for median, row in zip(medians, (peer, ours), strict=True)
        ]
        ratio = f"{medians[1] / medians[0]:.2f}" if None not in medians else ""
        lines.append(
            f"| {name} | {section.peer} {section.configuration} "
            f"| {_described(peer)}; {_described(ours)} "
            f"| {ours.get('batch_size', '')} x {ours.get('discriminator_steps', '')} "
            f"| {cells[0]} | {cells[1]} | {ratio} |"
        )
    return "\n".join(lines)


def _described(row: dict[str, Any]) -> str:
    if "parameters" not in row:
        return "-"
    millions = " / ".join(f"{number / 1e6:.2f}" for number in row["parameters"])
    reference = " (reference kernels)" if row.get("custom_kernels") == "reference" else ""
    return f"{row['precision']} {millions} M{reference}"


if __name__ == "__main__":
    main()
