"""Runs as jobs on a Ray cluster, by the jobs API of its dashboard: submit, follow, stop.

A job is `ganscale train` with a resolved configuration, on the cluster's head, in a package of this
very code. Nothing else is uploaded: no data, no runs. The name of a run is that of its jobs, of
which one at a time may be alive; the next goes on from the checkpoints of the one before.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

import ganscale
from ganscale.config import Config
from ganscale.data.resolve_source import NAMED_SOURCES
from ganscale.errors import ConfigError, GanscaleError
from ganscale.launch.secrets import NAMES_VARIABLE, own
from ganscale.launch.signals import EXIT_CODES
from ganscale.storage import is_url

_RUN_KEY = "ganscale_run"
_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_STOP_SECONDS = 3.0
"""Ray's own, of a job that does not say."""
_ALIVE = ("PENDING", "RUNNING")
_STOP_MARGIN_SECONDS = 30
"""Beyond `launch.grace_seconds`, after which a driver ends by itself."""
_PATIENCE_SECONDS = 120.0
_SILENT_SECONDS = 120.0
"""After so long without output, of which a run has a line each half minute, another connection is
made: it tells a job that is silent from one that cannot be reached."""
_LOOKS_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Submission:
    """What is to run, with what environment.

    `environment` is there for anybody to see on the cluster. `secrets` are names alone, of
    variables of the head's own environment that the run's workers get as well.
    """

    config: Config
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()

    def __post_init__(self) -> None:
        data, checkpoint = self.config.data, self.config.checkpoint
        here = {
            "data.shards": data.shards,
            "data.cache_dir": data.cache_dir,
            "checkpoint.location": checkpoint.location,
            "evaluation.reference": self.config.evaluation.reference,
            "method.generator": getattr(self.config.method, "generator", None),
            "data.source": None if data.shards or data.source in NAMED_SOURCES else data.source,
        }
        for name, place in here.items():
            if place is not None and not is_url(place) and not place.startswith(("/", "~")):
                raise ConfigError(
                    f"{name}={place} is relative to a folder of this machine, which the job does "
                    "not have: give a URL, or an absolute path that all hosts of the cluster have"
                )
        if self.config.launch.backend != "ray":
            raise ConfigError(
                f"launch.backend={self.config.launch.backend}: a job trains with launch.backend=ray"
            )
        if both := set(self.environment) & set(self.secrets):
            raise ConfigError(f"{', '.join(sorted(both))}: given both as --env and as --secret")

    @property
    def looking_secret(self) -> list[str]:
        """Names of plain variables that look as if nobody should see them."""
        return [name for name in self.environment if _LOOKS_SECRET.search(name)]


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    run: str
    """Name of the run; empty for a job that something else submitted."""
    status: str
    message: str
    started: float
    """Seconds since 1970; 0 if unknown."""
    ended: float
    """0 while it is alive."""
    code: int | None
    """Exit code of the entrypoint, once it has one."""
    stop_seconds: float = _STOP_SECONDS
    """How long it may take to end when it is asked to; then it is killed."""

    @property
    def is_alive(self) -> bool:
        """Whether it waits or runs."""
        return self.status in _ALIVE

    @property
    def exit_code(self) -> int:
        """The command's exit code for a job that has ended."""
        if self.code is not None:
            return self.code
        return {"SUCCEEDED": 0, "STOPPED": EXIT_CODES["terminated"]}.get(self.status, 1)


def connect(address: str) -> Jobs:
    """The jobs of the cluster whose dashboard is at `address`.

    Raises `GanscaleError` if none answers there, or wants a token that is not this one.
    """
    url = address if is_url(address) else f"http://{address}"
    for module in ("dashboard_sdk", "job.sdk"):  # which tell of every package and socket
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    with readable(url):
        # It asks for the version, which is where a wrong address or token shows.
        return Jobs(JobSubmissionClient(url), url)


class Jobs:
    """What can be done with jobs, through a `JobSubmissionClient`.

    All methods raise `GanscaleError` with a readable line when the cluster does not do it.
    """

    def __init__(self, client: Any, address: str) -> None:
        self.address = address
        self._client = client

    def submit(self, submission: Submission) -> Job:
        """Start a job. Raises `ConfigError` if one of that run is alive."""
        name = submission.config.name
        earlier = [job for job in self.all() if job.run == name]
        if alive := [job for job in earlier if job.is_alive]:
            raise ConfigError(
                f"{name} is on this cluster already, as job {alive[0].id} ({alive[0].status}): "
                f"see ganscale job logs {alive[0].id}, end it by ganscale job stop {alive[0].id}, "
                "or choose another name=..."
            )
        environment = dict(submission.environment)
        grace = math.ceil(submission.config.launch.grace_seconds)
        environment[_STOP_VARIABLE] = str(grace + _STOP_MARGIN_SECONDS)
        if submission.secrets:
            environment[NAMES_VARIABLE] = ",".join(submission.secrets)
        with tempfile.TemporaryDirectory(prefix="ganscale-job-") as folder:
            package(submission.config, Path(folder))
            with readable(self.address):
                # One that is submitted at the same time has the same id, and is refused by Ray.
                job_id = self._submit_when_up(
                    entrypoint="python -m ganscale train --config config.yaml",
                    submission_id=f"{name}-{_number(earlier) + 1}",
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata={_RUN_KEY: name},
                )
        return self.get(job_id)

    def _submit_when_up(self, **job: Any) -> str:
        # A cluster that has just been started answers before the agent that starts its jobs does.
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def all(self) -> list[Job]:
        """Every job that was submitted, oldest first."""
        with readable(self.address):
            found = [_job(details) for details in self._client.list_jobs()]
        return sorted((job for job in found if job.id), key=lambda job: job.started)

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        with readable(self.address):
            return _job(self._client.get_job_info(job_id))

    def find(self, name: str) -> Job:
        """The job with that id, or the newest of the run of that name.

        Raises `ConfigError` if there is neither, or both.
        """
        jobs = self.all()
        by_id = [job for job in jobs if job.id == name]
        by_run = [job for job in jobs if job.run == name]
        if by_id and by_run:
            raise ConfigError(
                f"{name} is the id of a job of run {by_id[-1].run!r}, and the name of a run whose "
                f"newest job is {by_run[-1].id}: give {by_run[-1].id} for this run, or "
                f"{by_id[-1].run!r} for the newest job of that one"
            )
        found = by_id or by_run
        if not found:
            known = ", ".join(dict.fromkeys(job.run or job.id for job in jobs[-8:])) or "none"
            raise ConfigError(f"no job or run {name!r} at {self.address}; there are: {known}")
        return found[-1]

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Pass on the job's output as it comes, until the job has ended; returns it then.

        A connection that breaks, or is silent for long, is taken up again where it was. What
        `write` raises is passed on.
        """
        log, failed, is_pending = _Log(write, self.address), 0.0, True
        while True:
            try:
                is_pending = is_pending and self.get(job_id).status == "PENDING"
                if not is_pending:
                    asyncio.run(log.take(self._client.tail_job_logs(job_id)))
                    job = self.get(job_id)
                    if not job.is_alive:
                        return job
                failed = 0.0
            except GanscaleError:
                failed = failed or time.monotonic()
                if time.monotonic() - failed > _PATIENCE_SECONDS:
                    raise
            time.sleep(1.0)

    def logs(self, job_id: str) -> str:
        """What the job has put out so far."""
        with readable(self.address):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> None:
        """Ask the job to checkpoint and end; returns at once."""
        with readable(self.address):
            self._client.stop_job(job_id)

    def wait_for_stop(self, job: Job) -> Job:
        """The job when it has ended. Raises `GanscaleError` if Ray does not end it in time."""
        deadline = time.monotonic() + job.stop_seconds + _STOP_MARGIN_SECONDS
        while (found := self.get(job.id)).is_alive:
            if time.monotonic() > deadline:
                raise GanscaleError(f"{job.id} is still {found.status}, though asked to end")
            time.sleep(0.5)
        return found


class _Log:
    """A job's output, of which every connection brings all from the beginning."""

    def __init__(self, write: Callable[[str], None], address: str) -> None:
        self._write = write
        self._address = address
        self._num_written = 0

    async def take(self, texts: AsyncIterator[str]) -> None:
        """Pass on what has not been passed on yet, until the end of the log or a long silence."""
        seen = 0
        while True:
            with readable(self._address):
                try:
                    # Ray waits for ever, also for a cluster that was cut off without a word.
                    text = await asyncio.wait_for(anext(texts, None), _SILENT_SECONDS)
                except TimeoutError:
                    return
            if text is None:
                return
            new = text[max(0, self._num_written - seen) :]
            seen += len(text)
            if new:
                self._write(new)
                self._num_written = seen


def variables(settings: Sequence[str]) -> dict[str, str]:
    """Turn `NAME=VALUE`, or `NAME` of a variable that is set here, into a mapping."""
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        found |= {name: value} if equals else own([name])
    return found


def package(config: Config, folder: Path) -> None:
    """What a job needs of this machine: the code and the configuration."""
    source = Path(ganscale.__file__).parent
    shutil.copytree(source, folder / "ganscale", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.yaml").write_text(config.to_yaml())


@contextmanager
def readable(address: str) -> Iterator[None]:
    """Say in one line what went wrong between here and the cluster at `address`."""
    try:
        yield
    except GanscaleError:
        raise
    except AuthenticationError as error:
        is_missing = error.message.startswith("Authentication required")
        wants = "wants a token" if is_missing else "does not accept this token"
        raise GanscaleError(
            f"the cluster at {address} {wants}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's"
        ) from error
    except (json.JSONDecodeError, KeyError) as error:
        raise GanscaleError(_no_dashboard(address)) from error
    except (OSError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
        raise GanscaleError(
            f"no Ray dashboard answers at {address}. Is the head up, with its dashboard "
            "(ray[default], --include-dashboard=true), and is this the dashboard's port (8265)?"
        ) from error
    except RuntimeError as error:
        if "returned 404" in str(error):
            raise GanscaleError(_no_dashboard(address)) from error
        raise GanscaleError(f"{address}: {_last_line(error)}") from error


def _no_dashboard(address: str) -> str:
    return f"what answers at {address} is no Ray dashboard: its port is 8265 unless it was changed"


def _last_line(error: Exception) -> str:
    """What a server's traceback says in the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _number(jobs: Sequence[Job]) -> int:
    """The highest number at the end of an id."""
    numbers = (re.fullmatch(r".*-([0-9]+)", job.id) for job in jobs)
    return max((int(match[1]) for match in numbers if match), default=0)


def _job(details: Any) -> Job:
    variables = (details.runtime_env or {}).get("env_vars") or {}
    return Job(
        id=details.submission_id or "",
        run=(details.metadata or {}).get(_RUN_KEY, ""),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        started=(details.start_time or 0) / 1000,
        ended=(details.end_time or 0) / 1000,
        code=details.driver_exit_code,
        stop_seconds=float(variables.get(_STOP_VARIABLE, _STOP_SECONDS)),
    )
