"""Commands for runs as jobs on a Ray cluster."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app
from ganscale.cli.options import Overrides
from ganscale.cli.training import PRESETS
from ganscale.config import load_config
from ganscale.errors import ConfigError, GanscaleError

if TYPE_CHECKING:
    from ganscale.launch.ray_jobs import Job, Jobs


job_app = typer.Typer(help="Manage runs on a Ray cluster.", no_args_is_help=True)
app.add_typer(job_app, name="job")


def _check_address(address: str) -> str:
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in ("http", "https"):
        raise ConfigError(f"--address {address}: expected http://HOST:8265, the dashboard's URL")
    return address


Address = Annotated[
    str,
    typer.Option(
        callback=_check_address,
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard, such as http://HEAD:8265.",
    ),
]
LOCAL = "http://127.0.0.1:8265"
Name = Annotated[str, typer.Argument(help="Name of the run, or id of the job.")]
# 128 + SIGINT, which is what shells report.
_INTERRUPTED = 130


@app.command(
    epilog="Example: ganscale submit --address http://HEAD:8265 "
    "--config dcgan-cifar10 --secret WANDB_API_KEY data.shards=s3://bucket/cifar10-train "
    "checkpoint.location=s3://bucket/runs launch.num_workers=8"
)
def submit(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help=f"A .yaml file, or one of {PRESETS}.")] = "quickstart",
    address: Address = LOCAL,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, or NAME for its value here; visible to all on the cluster."),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME of a variable that the head has and workers need; "
            "its value does not travel with the job."
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the job's output.")
    ] = False,
) -> None:
    """Train on a Ray cluster: submit code and configuration, and exit with the job's exit code.

    A run that was stopped or failed resumes from its checkpoints when it is submitted again.
    """
    from ganscale.launch.ray_jobs import Submission, connect, variables

    submission = Submission(
        load_config(config, overrides or []), variables(env or []), secret or []
    )
    for name in submission.looking_secret:
        typer.echo(
            f"ganscale: warning: {name} is shown on the cluster: set it where the head is started, "
            f"and use --secret {name}",
            err=True,
        )
    jobs = connect(address)
    job = jobs.submit(submission)
    # With --no-wait this line is the result; else the job's own output is.
    typer.echo(f"job {job.id} at {jobs.address}", err=not no_wait)
    if not no_wait:
        _follow(jobs, job)


@job_app.command("list", epilog="Example: ganscale job list --address http://HEAD:8265")
def job_list(address: Address = LOCAL) -> None:
    """List the cluster's jobs, oldest first."""
    from ganscale.launch.ray_jobs import connect

    for job in connect(address).all():
        typer.echo(_line(job))


@job_app.command("status", epilog="Example: ganscale job status dcgan-cifar10")
def job_status(name: Name, address: Address = LOCAL) -> None:
    """Print the status of a run's newest job."""
    from ganscale.launch.ray_jobs import connect

    job = connect(address).find(name)
    typer.echo(_line(job))
    if job.message:
        typer.echo(job.message)


@job_app.command("logs", epilog="Example: ganscale job logs dcgan-cifar10 --follow")
def job_logs(
    name: Name,
    address: Address = LOCAL,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow the output until the job ends.")
    ] = False,
) -> None:
    """Print the output of a run's newest job; --follow exits with the job's exit code."""
    from ganscale.launch.ray_jobs import connect

    jobs = connect(address)
    job = jobs.find(name)
    if follow:
        _follow(jobs, job)
    typer.echo(jobs.logs(job.id), nl=False)


@job_app.command("stop", epilog="Example: ganscale job stop dcgan-cifar10")
def job_stop(
    name: Name,
    address: Address = LOCAL,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not wait for the job to end.")
    ] = False,
) -> None:
    """Make a run's job write a checkpoint and end. When submitted again, the run resumes there."""
    from ganscale.launch.ray_jobs import connect

    jobs = connect(address)
    job = jobs.find(name)
    if not job.is_alive:
        raise GanscaleError(f"job {job.id} is over: {job.status}")
    jobs.stop(job.id)
    if not no_wait:
        job = jobs.wait_for_stop(job)
        typer.echo(_line(job))
        for line in jobs.logs(job.id).splitlines():
            if line.startswith("stopped at "):
                # What follows names a folder on the cluster.
                typer.echo(line.partition(";")[0])


def _follow(jobs: Jobs, job: Job) -> None:
    """Print the job's output until its end, and exit with its code."""
    try:
        ended = jobs.follow(job.id, partial(print, end="", flush=True))
    except KeyboardInterrupt:
        # Ctrl-C ends only this process: the job runs on the cluster.
        where = f"--address {jobs.address}"
        typer.echo(
            f"\nganscale: the job continues; follow it by ganscale job logs {job.id} --follow "
            f"{where}, end it by ganscale job stop {job.id} {where}",
            err=True,
        )
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(f"job {ended.id} {ended.status}", err=True)
    raise typer.Exit(ended.exit_code)


def _line(job: Job) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
    code = "" if job.code is None else f"  exit code {job.code}"
    return f"{job.id:28} {job.status:10} {started}{code}"
