"""The command that writes a report on runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ganscale.cli.app import app


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
