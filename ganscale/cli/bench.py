"""Commands that measure speed."""

from __future__ import annotations

from typing import Annotated

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import ConfigSource, Device, JsonFile, Overrides

__all__: list[str] = []

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command(
    "data", epilog="Example: ganscale bench data data/cifar10-train --json data.json"
)
def bench_data(
    root: Annotated[str, typer.Argument(help="Folder or URL of a shard set.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each way.")] = 5.0,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure images per second of each way to read a set, and of webdataset and torchvision."""
    from dataclasses import asdict

    import torch

    from ganscale.data.benchmark import bench_data
    from ganscale.data.shards import ShardSet

    # Figures are for one core, whatever the machine has.
    torch.set_num_threads(1)
    console = stderr_console()
    rows = bench_data(
        ShardSet.load(root),
        seconds=seconds,
        device=device,
        report=lambda name: console.print(f"measuring {name} ...", highlight=False),
    )
    typer.echo(f"{'':40} {'images/s':>12} {'MB/s':>9} {'ratio':>8}")
    for row in rows:
        megabytes = row.pixel_bytes_per_second / 1e6
        typer.echo(
            f"{row.name:40} {row.images_per_second:12,.0f} {megabytes:9,.1f} {row.ratio:8.1f}"
        )
    write_json(json_file, [asdict(row) for row in rows])


@bench_app.command(
    "train",
    epilog="Example: ganscale bench train --config stylegan2-ada-cifar10 launch.use_gpu=true "
    "training.precision=fp16 data.shards=data/cifar10-train",
)
def bench_train(
    overrides: Overrides = None,
    config: ConfigSource = "quickstart",
    seconds: Annotated[
        float, typer.Option(min=1, help="How long to train; at least thirty steps.")
    ] = 30.0,
    json_file: JsonFile = None,
) -> None:
    """Measure a configuration's training on one device: images per second, and time by part."""
    from dataclasses import asdict

    from ganscale.config import load_config
    from ganscale.launch.start import prepare_shards
    from ganscale.training.benchmark import bench_training
    from ganscale.world import World

    console = stderr_console()
    settings = prepare_shards(load_config(config, overrides or []), console)
    # The benchmark trains in this process; how runs scale is not its subject.
    settings = settings.with_changes({"launch.num_workers": 1})
    world = World.detect("cuda" if settings.launch.use_gpu else "cpu")
    with console.status(f"training for {seconds:g} s or thirty steps"):
        speed = bench_training(settings, world, seconds=seconds)
    typer.echo(f"{config}  {speed.precision}  batch {speed.batch_size}  {world.device}")
    typer.echo(f"{'images/s':16} {speed.images_per_second:10,.1f}")
    for name, mean in speed.parts.items():
        typer.echo(f"{name:16} {1000 * mean:10.2f} ms a step")
    if speed.peak_memory_gib is not None:
        total = f"of {speed.device_memory_gib:.2f} GiB"
        typer.echo(f"{'peak memory':16} {speed.peak_memory_gib:10.2f} {total}")
    write_json(json_file, asdict(speed))
