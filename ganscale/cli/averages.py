"""The command that chooses between the averages of a run's generator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import AutoDevice, JsonFile
from ganscale.config import ExtractorName
from ganscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ganscale.evaluation.distributions.averages import AverageResult, AveragesComparison

__all__: list[str] = []

_MAIN = "main"


@app.command(
    epilog="Example: ganscale averages runs/r3gan-small --num 5000    "
    "At an earlier position: ganscale averages runs/r3gan-small@2000"
)
def averages(
    run: Annotated[
        str, typer.Argument(help="Folder of a run, or RUN@KIMG for an earlier position.")
    ],
    num: Annotated[int, typer.Option(min=1, help="Images drawn from each average.")] = 5000,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; the same for all averages.")
    ] = 0,
    reference: Annotated[
        str | None,
        typer.Option(help="Shard set, folder, cifar10; default: what the run trains on."),
    ] = None,
    extractor: Annotated[
        ExtractorName,
        typer.Option(help="Network of the features; auto: Inception if its weights are installed."),
    ] = "auto",
    device: AutoDevice = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare the averages of a run's generator (training.extra_ema_halflives_kimg) by FID."""
    from ganscale.evaluation.distributions.averages import compare_averages
    from ganscale.evaluation.distributions.features import FeatureCache
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.run_references import default_reference
    from ganscale.metrics.extractors import open_extractor
    from ganscale.tracking.console import progress_bars
    from ganscale.world import World, process_group

    snapshots, nimg = _snapshots(run)
    world = World.detect(device)
    network = open_extractor(extractor)
    network.to(world.device)
    real = open_images(reference or default_reference(run))
    console = stderr_console() if world.is_main else None
    with process_group(world), progress_bars(console) as start_task:
        comparison = compare_averages(
            snapshots,
            real,
            network,
            world,
            num_images=num,
            seed=seed,
            cache=FeatureCache(),
            start_task=start_task,
        )
    # Ranks other than 0 have done their share.
    if comparison is None:
        return
    _print_table(comparison, nimg)
    write_json(json_file, comparison.to_json() | {"nimg": nimg})


def _snapshots(run: str) -> tuple[dict[str, Path], int]:
    """The snapshots of all averages at the position that `run` names, and that position."""
    from ganscale.config import load_config
    from ganscale.evaluation.run_references import RunReference, due_by
    from ganscale.run_directory import RunDirectory

    reference = RunReference.parse(run)
    run_dir = RunDirectory(reference.path)
    if not run_dir.config.is_file():
        raise CheckpointError(f"{run} is not a run: it has no {run_dir.config.name}")
    positions = run_dir.snapshot_positions()
    there = ", ".join(f"{nimg / 1000:g}" for nimg in positions)
    if reference.kimg is not None:
        last = due_by(reference.kimg, load_config(run_dir.config))
        positions = [nimg for nimg in positions if nimg <= last]
    if not positions:
        raise CheckpointError(
            f"no snapshot of {run}; the run has " + (f"some at {there} kimg" if there else "none")
        )
    snapshots = run_dir.averages_at(positions[-1])
    if len(snapshots) < 2:
        raise ConfigError(
            f"{run_dir.root} has one average at {positions[-1] / 1000:g} kimg, and nothing to "
            "choose from: train with further ones, training.extra_ema_halflives_kimg=[100, 1000]"
        )
    return snapshots, positions[-1]


def _print_table(comparison: AveragesComparison, nimg: int) -> None:
    """The protocol, a row for each average, and how the best one is drawn from."""
    protocol = comparison.protocol
    typer.echo(
        f"samples    {protocol['num_samples']:,} of each average at {nimg / 1000:g} kimg, the same "
        f"seeds from {protocol['seed']}"
    )
    typer.echo(f"reference  {protocol['reference']}")
    typer.echo(f"features   {protocol['extractor']}, {protocol['resizer']}")
    width = max(len(result.name or _MAIN) for result in comparison.results)
    width = max(width, len("average"))
    metric = comparison.metric
    column = max(9, len(metric))
    typer.echo(
        f"\n{'average':{width}} {metric:>{column}}  {'95 % interval':20}  above the best, in pairs"
    )
    for result in comparison.results:
        typer.echo(_row(result, comparison.best, width, column))
    best = comparison.best
    typer.echo(
        f"\nbest: {best.name or _MAIN}, {best.snapshot}\n"
        "It was chosen by these seeds, so its figure is a little too good: for one to publish, "
        f"measure the file with others, as in ganscale evaluate --snapshot FILE --seed "
        f"{protocol['seed'] + protocol['num_samples']}"
    )


def _row(result: AverageResult, best: AverageResult, width: int, column: int) -> str:
    name = f"{result.name or _MAIN:{width}}"
    distance, above = result.distance, result.above_best
    if distance is None or above is None:
        return f"{name} {'-':>{column}}  {result.problem}"
    bounds = f"{distance.low:.4g} to {distance.high:.4g}"
    return f"{name} {distance.value:{column}.4g}  {bounds:20}  " + (
        "the best" if result is best else str(above)
    )
