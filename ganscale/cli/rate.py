"""The command that asks people to rate images."""

from __future__ import annotations

import signal
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import Device, JsonFile, RatingTask, Reference
from ganscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ganscale.rating.contestants import Contestant
    from ganscale.rating.questions import Task


@app.command(epilog="Example: ganscale rate runs/quickstart --num 100 --out ratings/quickstart")
def rate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run, snapshot (.safetensors), or images.",
            show_default=False,
        ),
    ] = None,
    reference: Reference = None,
    task: Annotated[
        RatingTask, typer.Option(help="Tell real from fake, or choose the better of two.")
    ] = "realness",
    num: Annotated[int, typer.Option(min=1, help="Questions for each rater.")] = 100,
    pool: Annotated[
        int, typer.Option(min=1, help="Images of each run, of which raters see some.")
    ] = 500,
    out: Annotated[Path, typer.Option(help="Folder of the answers.")] = Path("ratings"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of images and order.")] = 0,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to serve at; 0 takes a free one.")
    ] = 8765,
    host: Annotated[str, typer.Option(help="Address to serve at.")] = "127.0.0.1",
    device: Device = "cpu",
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show raters at the end how often they were wrong.")
    ] = False,
    results: Annotated[
        bool, typer.Option("--results", help="Print the results so far and exit.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Serve a page on which people say which images are real, or better; print their error rates.

    Each answer is stored at once; the same command continues. Ctrl-C stops it and prints the
    results.
    """
    if results:
        _print_results(out, json_file)
        return
    if not runs:
        raise ConfigError("name at least one run (with --results only --out is needed)")
    if task == "realness" and num % 2:
        raise ConfigError(f"--num {num}: half of the images are real, so it must be even")
    contestants = _contestants(
        runs, reference, task=task, pool=pool, seed=seed, device=device, scratch=out / "downloads"
    )
    _serve(contestants, out, task=task, num=num, seed=seed, reveal=reveal, at=(host, port))
    typer.echo()
    _print_results(out, json_file)


def _contestants(
    runs: list[str],
    reference: str | None,
    *,
    task: Task,
    pool: int,
    seed: int,
    device: str,
    scratch: Path,
) -> list[Contestant]:
    """The runs, and the real images unless runs are compared with one another alone."""
    from ganscale.evaluation.image_sets import open_images
    from ganscale.rating.contestants import default_reference, open_contestant, open_runs
    from ganscale.rating.questions import REAL

    real = []
    # Several runs can be compared with one another alone; a single one needs something to be
    # compared to.
    if reference is not None or task == "realness" or len(runs) == 1:
        images = open_images(reference or default_reference(runs), scratch=scratch)
        real = [open_contestant(REAL, images, num_images=pool, seed=seed)]
    stderr_console().print(f"drawing images of {', '.join(runs)}", highlight=False, soft_wrap=True)
    return real + open_runs(runs, num_images=pool, seed=seed, device=device, scratch=scratch)


def _serve(
    contestants: list[Contestant],
    out: Path,
    *,
    task: Task,
    num: int,
    seed: int,
    reveal: bool,
    at: tuple[str, int],
) -> None:
    from ganscale.rating.server import RatingServer
    from ganscale.rating.session import RatingSession

    session = RatingSession(out, contestants, task=task, num=num, seed=seed, reveal=reveal)
    with closing(session), RatingServer(session, *at) as server:
        if not server.only_loopback:
            message = "anybody who can reach this machine may rate: there is no password"
            stderr_console().print(message, highlight=False, soft_wrap=True, style="yellow")
        with suppress(KeyboardInterrupt):
            # A shell starts background jobs (`&`) with SIGINT ignored, so it is set again.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            typer.echo(f"page       {server.url}")
            typer.echo(f"answers    {session.answers.path}")
            typer.echo("Ctrl-C stops it and prints the results.")
            server.serve_forever()


def _print_results(out: Path, json_file: Path | None) -> None:
    from ganscale.rating.answers import read_answers
    from ganscale.rating.results import as_json, as_table
    from ganscale.rating.session import ANSWERS_NAME

    if not out.is_dir():
        raise DataError(f"{out} holds no answers")
    answers = read_answers(out / ANSWERS_NAME)
    for line in as_table(answers):
        typer.echo(line)
    write_json(json_file, as_json(answers))
