"""Commands that train, and that show what a run would use, does and has done."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, stderr_console
from ganscale.cli.options import Overrides
from ganscale.config import Config, load_config, parse_overrides
from ganscale.config.loading import PRESET_COLUMNS, preset_rows
from ganscale.errors import ConfigError, GanscaleError
from ganscale.run_directory import RunDirectory
from ganscale.world import launched_rank

if TYPE_CHECKING:
    from ganscale.training.stopping import TrainResult

# A list here, since reading the folder would load the configuration for `ganscale --help`.
PRESETS = (
    "quickstart, dcgan-cifar10, speedrun-cifar10, sngan-cifar10, biggan-cifar10, "
    "stylegan2-ada-cifar10, r3gan-cifar10, r3gan-small, photos-64, photos-128, photos-256, "
    "vae-cifar10, vae-gan-cifar10, encoder-cifar10, bigan-cifar10, semi-supervised-cifar10, "
    "spectrograms-small"
)
_STATUS_SECONDS = 10.0
"""Between two looks of `watch` at whether the run's process is alive."""


TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="Take the run over from a live process that trains it; that process ends without a "
        "last checkpoint.",
    ),
]


@app.command(epilog="Example: ganscale train --config quickstart name=first seed=1")
def train(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help=f"A .yaml file, or one of {PRESETS}.")] = "quickstart",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and the plan, and exit.")
    ] = False,
    take_over: TakeOver = False,
) -> None:
    """Train, or resume the run of that name from its newest checkpoint that verifies."""
    settings = load_config(config, overrides or [])
    _check_environment(settings)
    if dry_run:
        _print_plan(settings)
        return
    _run(settings, take_over=take_over)


@app.command(epilog="Example: ganscale resume runs/quickstart training.total_kimg=500")
def resume(
    run: Annotated[str, typer.Argument(help="Folder of the run, or URL of its checkpoints.")],
    overrides: Overrides = None,
    take_over: TakeOver = False,
) -> None:
    """Resume a run from its newest checkpoint that verifies, at any number of workers."""
    from ganscale.launch.start import resume_config

    settings = resume_config(run, parse_overrides(overrides or []))
    _check_environment(settings)
    _run(settings, take_over=take_over)


@app.command(epilog="Example: ganscale watch runs/quickstart")
def watch(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    once: Annotated[
        bool, typer.Option("--once", help="Show how it stands and exit, without waiting.")
    ] = False,
) -> None:
    """Follow a run that trains elsewhere, until it ends; Ctrl-C stops watching, not the run.

    Exits with 1 if the run has failed, or its process is gone.
    """
    from rich.console import Console

    from ganscale.report.runs import Run
    from ganscale.report.status import status_of
    from ganscale.tracking.live_view import RunFollower, view

    run_dir = RunDirectory(run.absolute())
    if not run_dir.config.is_file():
        raise ConfigError(f"{run} is not a run: it has no {run_dir.config.name}")
    total, console = load_config(run_dir.config).total_nimg, Console(markup=False, emoji=False)
    follower = RunFollower(run_dir, total, console, from_start=True)
    if once or follower.status.is_over:
        console.print(view(follower.status, now=time.time()))
        return
    with follower:
        next_look = time.monotonic() + _STATUS_SECONDS
        while not follower.status.is_over:
            time.sleep(0.3)
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + _STATUS_SECONDS
            # A run that failed or was killed writes nothing more, and so never says that it ended.
            status = status_of(Run.read(str(run)))
            if status.kind in ("failed", "interrupted"):
                raise GanscaleError(
                    f"{run} does not train any more ({status.kind}): {status.reason} "
                    f"To go on: ganscale resume {shlex.quote(str(run))}"
                )


@app.command(
    epilog="Example: ganscale report runs/quickstart    Several, side by side: ganscale report "
    "runs/a runs/b --out compared.html"
)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file; default: report.html in the run's folder, or here for several runs.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML file about runs from their folders: samples, curves, faults, what next.

    It can be made at any time, also while a run trains, and is complete in itself.
    """
    from rich.filesize import decimal

    from ganscale.report import write_report

    written = write_report(runs, out)
    typer.echo(f"wrote {written.path} ({decimal(written.num_bytes)})")


@app.command(epilog="Example: ganscale presets")
def presets() -> None:
    """List the presets: the model, losses, batch size and length of each."""
    rows = [PRESET_COLUMNS, *preset_rows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


@app.command(epilog="Example: ganscale doctor --storage runs")
def doctor(
    storage: Annotated[Path, typer.Option(help="Folder in which runs would be written.")] = Path(
        "runs"
    ),
) -> None:
    """Print machine, devices, versions, free space and the defaults that follow from them."""
    from ganscale.doctor import findings

    for name, value in findings(storage):
        typer.echo(f"{name:18} {value}")


def _check_environment(config: Config) -> None:
    """Raise now what would otherwise end the run only after its shards have been built."""
    from ganscale.tracking.wandb_sink import finish_timeout, resolve_mode
    from ganscale.world import check_cuda

    if resolve_mode(config.tracking.wandb) != "disabled":
        finish_timeout()
    if config.launch.use_gpu and config.launch.backend == "inprocess":
        check_cuda("launch.use_gpu=true")


def _run(config: Config, *, take_over: bool) -> None:
    with _ray_started_early(config):  # before anything here imports torch
        from ganscale.launch.signals import EXIT_CODES
        from ganscale.launch.start import start

        result = start(config, stderr_console(), take_over=take_over)
    if launched_rank() == 0:
        _print_results(config, result)
    if not result.has_trained:
        # A stop before training must be quick, and tearing down Ray and torch would take seconds.
        sys.stdout.flush()
        os._exit(EXIT_CODES[result.reason])
    if result.reason:
        raise typer.Exit(EXIT_CODES[result.reason])


def _ray_started_early(config: Config) -> AbstractContextManager[None]:
    """Ray starts while torch is imported, which takes as long."""
    if config.launch.backend != "ray":
        return nullcontext()
    from ganscale.launch.ray_cluster import started_early

    return started_early(config)


def _print_results(config: Config, result: TrainResult) -> None:
    from ganscale.checkpoint import CheckpointStore

    if not result.has_trained:
        typer.echo(f"{result.reason} before there was room to train: the run is as it was")
        return
    run_dir, store = RunDirectory(config.run_dir), CheckpointStore(config.checkpoints)
    typer.echo(f"run        {run_dir.root}")
    for name, paths in (
        ("samples", run_dir.sample_grids().values()),
        ("snapshots", map(run_dir.snapshot, run_dir.snapshot_positions())),
    ):
        typer.echo(f"{name:10} {next(reversed([*paths]), None)}")
    typer.echo(f"checkpoint {next((store.where(name) for name in store.lineage()), None)}")
    if result.reason:
        typer.echo(
            f"stopped at {result.nimg / 1000:g} of {config.total_nimg / 1000:g} kimg; "
            f"to go on: ganscale resume {shlex.quote(str(run_dir.root))}"
        )


def _print_plan(config: Config) -> None:
    from ganscale.training.dry_run import describe_plan

    typer.echo(config.to_yaml())
    for line in describe_plan(config):
        typer.echo(f"# {line}")
