"""Commands for a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app
from ganscale.config import load_config
from ganscale.errors import CheckpointError
from ganscale.run_directory import RunDirectory

if TYPE_CHECKING:
    from ganscale.checkpoint import CheckpointStore


checkpoint_app = typer.Typer(help="Inspect a run's checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


Run = Annotated[str, typer.Argument(help="Folder of the run, or URL of its checkpoints.")]


@checkpoint_app.command("list", epilog="Example: ganscale checkpoint list runs/quickstart")
def checkpoint_list(run: Run) -> None:
    """List a run's checkpoints, whether each verifies, and from which one the run would resume."""
    store = _checkpoints(run)
    line = store.lineage()
    usable = []
    for name in store.names():
        problem = store.verify(name)
        state = "verified" if problem is None else f"DAMAGED: {problem}"
        if name not in line:
            state += ", not part of the run: a newer attempt began before it"
        elif problem is None:
            usable.append(name)
        typer.echo(f"{name}  {name.nimg / 1000:10.1f} kimg  {state}")
    for folder in store.unfinished():
        typer.echo(f"{folder.path}  unfinished")
    typer.echo(f"resumes from {max(usable) if usable else 'nothing'}")


@checkpoint_app.command("verify", epilog="Example: ganscale checkpoint verify runs/quickstart")
def checkpoint_verify(run: Run) -> None:
    """Check sizes and hashes of all checkpoints; exit code 1 if one is damaged."""
    store = _checkpoints(run)
    names = store.names()
    problems = {name: problem for name in names if (problem := store.verify(name)) is not None}
    for name, problem in problems.items():
        typer.echo(f"{store.where(name)}: {problem}")
    if problems:
        raise CheckpointError(f"{len(problems)} of {len(names)} checkpoints are damaged")
    typer.echo(f"{len(names)} checkpoints verified")


@checkpoint_app.command("repair", epilog="Example: ganscale checkpoint repair runs/quickstart")
def checkpoint_repair(run: Run) -> None:
    """Move damaged checkpoints aside and remove incomplete ones; valid ones are not touched."""
    for line in _checkpoints(run).repair() or ["nothing to repair"]:
        typer.echo(line)


def _checkpoints(run: str) -> CheckpointStore:
    from ganscale.checkpoint import CheckpointStore
    from ganscale.storage import is_url

    run_dir = RunDirectory(Path(run).expanduser().absolute())
    location = run if is_url(run) else str(run_dir.root / "checkpoints")
    if not is_url(run) and run_dir.config.is_file():
        # The folder may have been moved since its configuration was written.
        place = {"storage": str(run_dir.root.parent), "name": run_dir.name}
        location = load_config(run_dir.config).with_changes(place).checkpoints
    store = CheckpointStore(location)
    if not store.names():
        raise CheckpointError(f"no checkpoints in {store.location}")
    return store
