"""The command itself, to which the other modules of this package add their subcommands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ganscale import __version__
from ganscale.errors import naming_file

if TYPE_CHECKING:
    from rich.console import Console

_GROUPS = {
    "Train": ("train", "resume", "presets", "sweep", "stability"),
    "Look": ("watch", "report", "sample", "interpolate", "directions", "mix", "nearest"),
    "Measure": ("evaluate", "averages", "compare", "tournament", "rate", "dashboard", "bench"),
    "Use": ("reconstruct", "recognise", "export", "checkpoint"),
    "Data": ("shards",),
    "Cluster": ("submit", "job", "doctor"),
}
"""The verbs as `ganscale --help` lists them."""


class _Commands(TyperGroup):
    """Commands that print their help, with exit code 0, when nothing follows their name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs in groups, each with the first sentence of its help."""
        width = max(map(len, self.commands))
        for title, names in _GROUPS.items():
            with formatter.section(title):
                rows = [(f"{name:{width}}", _sentence(self.commands[name])) for name in names]
                formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # The groups below, such as `shards`, are found here, so they need no class of their own.
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, TyperGroup) and not rest:
            rest = ["--help"]
        return name, command, rest


def _sentence(command: Any) -> str:
    """The first sentence of a command's help."""
    text = " ".join((command.help or "").split())
    first, dot, _ = text.partition(". ")
    return f"{first}." if dot else text


app = typer.Typer(
    name="ganscale",
    cls=_Commands,
    help="Train GANs, VAEs, encoders and classifiers on images, at cluster scale.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ganscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the subcommand."""
    # `main` reads --debug itself, since it is accepted after the subcommand, too; here it is for
    # --help.


def write_json(path: Path | None, values: Any) -> None:
    """Write values to the file of a `JsonFile` option, if there is one; not finite ones as null."""
    if path is not None:
        # JSON has no Infinity and no NaN, which Python writes and most other readers refuse.
        finite = json.loads(json.dumps(values), parse_constant=lambda _: None)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not atomically: people also name /dev/stdout, a link that must not be replaced.
        with naming_file(path):
            path.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")


def stderr_console() -> Console:
    """The console on standard error, for progress and notices."""
    from ganscale.tracking.console import stderr_console as console

    return console()
