"""The command itself, to which the other modules of this package add their verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Overrides", "app", "stderr_console"]

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


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the verb; `main` reads --debug itself."""


def stderr_console() -> Console:
    """Where progress and notices go."""
    from ganscale.tracking.console import stderr_console as console

    return console()
