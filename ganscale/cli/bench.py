"""Verbs that measure speed."""

from __future__ import annotations

from typing import Annotated

import typer

from ganscale.cli.app import JsonFile, app, stderr_console, write_json

__all__: list[str] = []

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def _bench() -> None:
    """Keeps `data` a verb of its own."""


@bench_app.command(
    "data", epilog="Example: ganscale bench data data/cifar10-train --json data.json"
)
def bench_data(
    root: Annotated[str, typer.Argument(help="Folder or URL of a shard set.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured.")] = 5.0,
    device: Annotated[str, typer.Option(help="For the device cache: cpu, cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Images per second of each way to read a set, beside webdataset and torchvision."""
    from dataclasses import asdict

    import torch

    from ganscale.data.benchmark import bench_data
    from ganscale.data.shards import ShardSet

    torch.set_num_threads(1)
    console = stderr_console()
    rows = bench_data(
        ShardSet.load(root),
        seconds=seconds,
        device=device,
        started=lambda name: console.print(f"measuring {name} ...", highlight=False),
    )
    typer.echo(f"{'':40} {'images/s':>12} {'MB/s':>9} {'ratio':>8}")
    for row in rows:
        megabytes = row.pixel_bytes_per_second / 1e6
        typer.echo(
            f"{row.name:40} {row.images_per_second:12,.0f} {megabytes:9,.1f} {row.ratio:8.1f}"
        )
    write_json(json_file, [asdict(row) for row in rows])
