"""The command that compares configurations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, stderr_console

if TYPE_CHECKING:
    from ganscale.launch.sweep_book import Book

__all__: list[str] = []


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
    from ganscale.tracking.wandb_settings import check_environment

    checked = Sweep.load(file)
    check_environment(checked.base.tracking.wandb)
    if dry_run:
        from ganscale.launch.sweep_table import settings_text

        for trial in checked.trials():
            typer.echo(f"{trial.name}  {settings_text(checked, trial.values)}")
        return
    from ganscale.launch.signals import EXIT_CODES
    from ganscale.launch.sweep import run_sweep

    book, stopped = run_sweep(checked, stderr_console())
    _print_standings(book)
    if stopped:
        typer.echo(f"stopped; to go on: ganscale sweep {file}")
        raise typer.Exit(EXIT_CODES[stopped])
    if book.unfinished:
        raise typer.Exit(1)


def _print_standings(book: Book) -> None:
    from rich.console import Console

    from ganscale.launch.sweep_table import best_command, sweep_table

    # Wide, so that nothing is cut off where the output is read by another program.
    Console(width=10_000 if not Console().is_terminal else None).print(sweep_table(book))
    for standing in book.standings.values():
        if standing.message:
            typer.echo(f"{standing.name}: {standing.message}")
    command = best_command(book)
    if command is not None:
        typer.echo(f"best: {command}")
