"""The command itself, to which the other modules of this package add their verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganscale import __version__

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JsonFile", "Overrides", "app", "stderr_console", "write_json"]

app = typer.Typer(
    name="ganscale",
    help="Train GANs on images at cluster scale: exact resume, worker-independent order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.field=value ...", show_default=False)
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ganscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it, and exit."),
    ] = False,
) -> None:
    """Options before the verb; `main` reads --debug itself."""


def write_json(path: Path | None, values: Any) -> None:
    """For `JsonFile`: in a folder that need not be there."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")


def stderr_console() -> Console:
    """Where progress and notices go."""
    from ganscale.tracking.console import stderr_console as console

    return console()
