"""The command that creates a W&B dashboard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.config.sections import valid_wandb_project
from ganscale.errors import ConfigError, GanscaleError


def _check_project(name: str) -> str:
    try:
        return valid_wandb_project(name)
    except ValueError as error:
        raise ConfigError(f"--project {name}: {error}") from None


@app.command("dashboard", epilog="Example: ganscale dashboard --project ganscale --group sweep-1")
def dashboard(
    project: Annotated[
        str, typer.Option(callback=_check_project, help="W&B project.")
    ] = "ganscale",
    entity: Annotated[
        str | None,
        typer.Option(help="User or team; default: WANDB_ENTITY, else the owner of the key."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Show only the runs of this group, as one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the definition to this file and contact no server.")
    ] = None,
) -> None:
    """Create a project's W&B workspace and report; without a key, print their definition."""

    from ganscale.tracking import dashboard as dashboards
    from ganscale.tracking.wandb_sink import resolve_mode

    entity = entity or os.environ.get("WANDB_ENTITY")
    if out is not None or resolve_mode("auto") != "online":
        made = dashboards.definition(entity or "", project, group)
        if out is None:
            notice = (
                "W&B is not online here (no API key, or WANDB_MODE): this is what would be stored"
            )
            stderr_console().print(notice, style="yellow", soft_wrap=True)
            typer.echo(json.dumps(made, indent=2))
        else:
            write_json(out, made)
            typer.echo(f"wrote {out}")
        return
    try:
        for place in dashboards.saved(entity, project, group):
            typer.echo(place)
    except GanscaleError:
        raise
    except Exception as error:  # wandb passes on the errors of its HTTP library
        brief = " ".join(str(error).split())[:300]
        raise GanscaleError(
            f"W&B did not take the dashboard ({type(error).__name__}: {brief}); "
            "--out FILE writes its definition"
        ) from error
