"""The command that compares configurations."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ganscale.cli.app import app, stderr_console

if TYPE_CHECKING:
    from ganscale.config.sweep import Sweep
    from ganscale.launch.sweep_status import TrialStatus


@app.command(epilog="Example: ganscale sweep docs/sweeps/learning-rates.yaml --dry-run")
def sweep(
    file: Annotated[
        Path, typer.Argument(help="YAML file of what varies and how trials are compared.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and exit.")] = False,
) -> None:
    """Train many configurations on Ray Tune: halving (ASHA), populations, or each to its end.

    The same command resumes a sweep that was interrupted. docs/how-to/sweeps.md describes the file.
    """
    from ganscale.config.sweep import Sweep
    from ganscale.tracking.wandb_sink import resolve_mode

    checked = Sweep.load(file)
    resolve_mode(checked.base.tracking.wandb)
    if dry_run:
        for trial in checked.trials():
            typer.echo("  ".join([trial.name, *_words(checked.settings(trial.values))]))
        return
    from rich.console import Console

    from ganscale.launch.signals import EXIT_CODES
    from ganscale.launch.sweep import run_sweep
    from ganscale.launch.sweep_table import sweep_table

    statuses, stopped = run_sweep(checked, stderr_console())
    # Wide, so that nothing is cut off where the output is read by another program.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000
    console.print(sweep_table(checked, statuses))
    for status in statuses:
        if status.message:
            typer.echo(f"{status.name}: {status.message}")
    if command := _best_command(checked, statuses):
        typer.echo(f"best: {command}")
    if stopped:
        typer.echo(f"stopped; to go on: ganscale sweep {shlex.quote(str(file))}")
        raise typer.Exit(EXIT_CODES[stopped])
    if not all(status.is_over for status in statuses):
        raise typer.Exit(1)


def _best_command(sweep: Sweep, statuses: Sequence[TrialStatus]) -> str | None:
    """The command that trains as the best trial did, or goes on with it; None without reports.

    Values of a population's trial have changed on its way, so there is no command that repeats it.
    """
    from ganscale.launch.sweep_table import ranked

    best = ranked(sweep, statuses)[0]
    if best.score is None:
        return None
    if sweep.file.scheduler.name == "pbt":
        total = 2 * sweep.base.training.total_kimg
        run = str(sweep.root / best.name)
        return shlex.join(["ganscale", "resume", run, f"training.total_kimg={total:g}"])
    words = _words({**sweep.file.overrides, **sweep.settings(best.values)})
    command = ["ganscale", "train", "--config", sweep.source, f"name={best.name}-again", *words]
    return shlex.join(command)


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they are given on the command line, in YAML on one line."""
    words = []
    for name, value in settings.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
        words.append(f"{name}=" + text.removesuffix("...\n").strip())
    return words
