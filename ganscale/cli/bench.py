"""The command that measures speed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import ConfigSource, JsonFile, Overrides
from ganscale.config import Config, load_config
from ganscale.world import World

_PHASES = ("discriminator", "generator")

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command(
    "train",
    epilog="Example: ganscale bench train --config stylegan2-ada-cifar10 launch.use_gpu=true "
    "training.precision=fp16 data.shards=data/cifar10-train. "
    "With --compare: ganscale bench train --compare --config dcgan-cifar10 --rounds 5 --seconds 20",
)
def bench_train(
    overrides: Overrides = None,
    config: ConfigSource = "quickstart",
    seconds: Annotated[
        float, typer.Option(min=1, help="How long to train; at least thirty steps.")
    ] = 30.0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Measure the ways to run it here in turns: on a GPU launched, captured and "
            "compiled steps, on the CPU one thread and all, compiled or not.",
        ),
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, help="How many times --compare measures each of them.")
    ] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure a configuration's training on one device: images per second, and time by part."""

    from ganscale.launch.resolve_run import prepare_shards
    from ganscale.training.benchmark import bench_training

    console = stderr_console()
    settings = prepare_shards(load_config(config, overrides or []), console)
    # The benchmark trains in this process; how runs scale is not its subject.
    settings = settings.with_changes({"launch.num_workers": 1})
    world = World.detect("cuda" if settings.launch.use_gpu else "cpu")
    if compare:
        _compare(settings, world, name=config, seconds=seconds, rounds=rounds, file=json_file)
        return
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


def _compare(
    config: Config, world: World, *, name: str, seconds: float, rounds: int, file: Path | None
) -> None:
    """Measure the variants of a configuration, print a table of them, write all of it as JSON."""
    import torch

    from ganscale.training.benchmark import compare_variants, speed_variants
    from ganscale.training.precision import Precision

    console = stderr_console()
    device = world.torch_device
    results = compare_variants(
        config,
        world,
        speed_variants(config, device),
        seconds=seconds,
        rounds=rounds,
        report=lambda text: console.print(text, highlight=False),
    )
    rows = [result.summary() for result in results]
    precision = Precision.resolve(config.training.precision, device).name
    batch_size = config.training.batch_size
    typer.echo(
        f"{name}  {precision}  batch {batch_size}  {world.device}  "
        f"medians of {rounds} round(s) of {seconds:g} s"
    )
    header = ("images/s", "least", "most", "ratio", "ms a step", "D ms", "G ms", "GiB")
    typer.echo(f"{'':24}" + "".join(f"{title:>11}" for title in header))
    for row in rows:
        typer.echo(f"{row['variant']:24}{_cells(row, batch_size)}")
    write_json(
        file,
        {
            "config": name,
            "precision": precision,
            "batch_size": batch_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "seconds": seconds,
            "variants": rows,
        },
    )


def _cells(row: dict[str, Any], batch_size: int) -> str:
    """The figures of one variant in columns, or why there are none."""
    if row["images_per_second"] is None:
        return f"   {row['obstacle']}"
    speed, parts, ratio = row["images_per_second"], row["parts"], row["ratio"]
    cells = [
        *(f"{value:,.1f}" for value in (speed, min(row["rounds"]), max(row["rounds"]))),
        "" if ratio is None else f"{ratio:.2f}",
        f"{1000 * batch_size / speed:,.2f}",
        # A replayed step is one part.
        *(f"{1000 * parts[name]:,.2f}" if name in parts else "" for name in _PHASES),
        "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}",
    ]
    return "".join(f"{cell:>11}" for cell in cells) + (
        f"   then: {row['obstacle']}" if row["obstacle"] else ""
    )
