"""Submitting and following jobs: what is sent, what is refused, and that secrets are not shown."""

from __future__ import annotations

import asyncio
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.ray_constants import RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError

import ganscale
from ganscale.config import Config
from ganscale.errors import ConfigError, GanscaleError
from ganscale.launch import ray_jobs, secrets
from ganscale.launch.ray_jobs import Job, Jobs, Submission, readable, variables

requests: Any = pytest.importorskip("requests")  # Ray's, whose errors are read

ADDRESS = "http://head:8265"
PLANTED = "planted-4b1d"
SILENCE = "not a word more on this connection"


def submission(*, env: dict[str, str] | None = None, **changes: Any) -> Submission:
    base = {"name": "mine", "data.shards": "s3://bucket/shards"}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return Submission(Config().with_changes({**base, **named}), env or {})


def details(job_id: str, run: str, status: str, *, start: int = 0, **more: Any) -> Any:
    """As the jobs API describes a job."""
    known = {"message": None, "end_time": None, "driver_exit_code": None, "runtime_env": None}
    return SimpleNamespace(
        submission_id=job_id,
        status=SimpleNamespace(value=status),
        start_time=1000 * start,
        metadata={"ganscale_run": run} if run else None,
        **{**known, **more},
    )


@dataclass
class FakeClient:
    """A cluster whose jobs are what a test says, and which keeps what it is sent."""

    jobs: list[Any] = field(default_factory=list)
    statuses: list[str | Exception] = field(default_factory=list)
    """Of the only job, one a look, or why there is no answer; the last one stays."""
    texts: list[list[str | Exception]] = field(default_factory=list)
    """Of the log, for each time that it is followed from its beginning."""
    refusals: list[str] = field(default_factory=list)
    """Why submissions are not taken, one after the other."""
    sent: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, bytes] = field(default_factory=dict)

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **options: Any) -> str:
        if self.refusals:
            raise RuntimeError(f"Request failed with status code 500: {self.refusals.pop(0)}")
        self.sent = options
        root = Path(options["runtime_env"]["working_dir"])
        self.packed = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
        run, job_id = options["metadata"]["ganscale_run"], str(options["submission_id"])
        self.jobs.append(details(job_id, run, "PENDING", runtime_env=options["runtime_env"]))
        return job_id

    def get_job_info(self, job_id: str) -> Any:
        (job,) = [job for job in self.jobs if job.submission_id == job_id]
        if self.statuses:
            status = self.statuses[0]
            self.statuses = self.statuses[1:] or self.statuses
            if isinstance(status, Exception):
                raise status
            job.status.value = status
        return job

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self.texts.pop(0):
            await asyncio.sleep(0)
            if isinstance(text, Exception):
                raise text
            if text == SILENCE:
                await asyncio.sleep(3600)
            yield text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between two looks."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_the_code_and_the_configuration_are_sent_and_nothing_else() -> None:
    client = FakeClient()
    job = Jobs(client, ADDRESS).submit(submission(seed=7, launch__grace_seconds=12.5))
    assert (job.id, job.run, job.stop_seconds) == ("mine-1", "mine", 13 + 30)
    assert client.sent["entrypoint"] == "python -m ganscale train --config config.yaml"
    assert {name.partition("/")[0] for name in client.packed} == {"ganscale", "config.yaml"}
    package = Path(ganscale.__file__ or "").parent
    modules = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
    assert modules <= set(client.packed)
    assert not [name for name in client.packed if "__pycache__" in name]
    assert b"seed: 7" in client.packed["config.yaml"]


def test_a_cluster_that_has_just_been_started_is_waited_for(quick: None) -> None:
    client = FakeClient(refusals=["No available agent to submit job, please try again later."] * 2)
    assert Jobs(client, ADDRESS).submit(submission()).id == "mine-1"
    client = FakeClient(refusals=["the disk is full"])
    with pytest.raises(GanscaleError, match="the disk is full"):
        Jobs(client, ADDRESS).submit(submission())


def test_of_secrets_the_names_alone_go_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    client = FakeClient()
    given = Submission(submission().config, {"PLAIN": "shown"}, ["WANDB_API_KEY", "OTHER"])
    Jobs(client, ADDRESS).submit(given)
    shown = client.sent["runtime_env"]["env_vars"]
    assert shown["PLAIN"] == "shown"
    assert shown[secrets.NAMES_VARIABLE] == "WANDB_API_KEY,OTHER"
    assert PLANTED not in repr(client.sent)
    assert not [name for name, data in client.packed.items() if PLANTED.encode() in data]


def test_the_values_of_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", PLANTED)
    assert secrets.own(["GIVEN"]) == {"GIVEN": PLANTED}
    assert variables(["A=b=c", "GIVEN", "EMPTY="]) == {"A": "b=c", "GIVEN": PLANTED, "EMPTY": ""}
    monkeypatch.delenv("GIVEN")
    for ask in (secrets.own, variables):
        with pytest.raises(ConfigError, match="GIVEN: not set in the environment"):
            ask(["GIVEN"])


def test_workers_get_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(secrets.NAMES_VARIABLE, raising=False)
    assert secrets.for_workers() == {}
    monkeypatch.setenv(secrets.NAMES_VARIABLE, "FIRST, SECOND")
    monkeypatch.setenv("FIRST", "1")
    monkeypatch.setenv("SECOND", "2")
    monkeypatch.setenv("THIRD", "3")
    assert secrets.for_workers() == {"FIRST": "1", "SECOND": "2"}
    monkeypatch.delenv("SECOND")
    with pytest.raises(ConfigError, match="SECOND: not set .* submit --secret. names variables of"):
        secrets.for_workers()


def test_variables_that_look_secret_are_told_of() -> None:
    names = dict.fromkeys(["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "db_password"], "")
    assert submission(env={**names, "AWS_ENDPOINT_URL": "", "FOO": ""}).looking_secret == [*names]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.shards": "data/mine"}, "data.shards=data/mine is relative"),
        ({"checkpoint.location": "saved"}, "checkpoint.location=saved is relative"),
        ({"data.cache_dir": "cache"}, "data.cache_dir=cache is relative"),
        ({"launch.backend": "inprocess"}, "a job trains with launch.backend=ray"),
    ],
)
def test_what_cannot_work_on_a_cluster_is_refused_here(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        submission(**changes)


def test_a_variable_is_either_plain_or_secret() -> None:
    with pytest.raises(ConfigError, match="BOTH: given both"):
        Submission(submission().config, {"BOTH": "1"}, ["BOTH"])


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_run_that_is_alive_is_not_submitted_again(status: str) -> None:
    client = FakeClient([details("mine-1", "mine", "FAILED"), details("mine-2", "mine", status)])
    with pytest.raises(ConfigError, match=f"already, as job mine-2 .{status}.: .* job stop mine-2"):
        Jobs(client, ADDRESS).submit(submission())
    assert not client.sent


def test_a_run_that_has_ended_is_and_another_is_in_nobody_s_way() -> None:
    client = FakeClient(
        [
            details("mine-9", "mine", "FAILED", start=2),
            details("mine-10", "mine", "STOPPED", start=3),
            details("other-1", "other", "RUNNING"),
            details("raysubmit_x", "", "RUNNING"),
        ]
    )
    assert Jobs(client, ADDRESS).submit(submission()).id == "mine-11"


def test_a_job_is_found_by_its_id_or_as_the_newest_of_its_run() -> None:
    client = FakeClient(
        [
            details("mine-2", "mine", "RUNNING", start=20),
            details("mine-1", "mine", "STOPPED", start=10),
            details("raysubmit_x", "", "RUNNING", start=5),
        ]
    )
    jobs = Jobs(client, ADDRESS)
    assert jobs.find("mine").id == "mine-2"
    assert jobs.find("mine-1").status == "STOPPED"
    assert [job.id for job in jobs.all()] == ["raysubmit_x", "mine-1", "mine-2"]
    with pytest.raises(ConfigError, match="'yours' at http://head:8265; .*raysubmit_x, mine"):
        jobs.find("yours")


def test_a_name_that_is_one_job_s_id_and_another_run_s_name_is_refused() -> None:
    client = FakeClient(
        [details("exp-1", "exp", "RUNNING"), details("exp-1-1", "exp-1", "RUNNING", start=10)]
    )
    jobs = Jobs(client, ADDRESS)
    with pytest.raises(ConfigError, match=r"exp-1 is the id of .* 'exp', .* job is exp-1-1: give"):
        jobs.find("exp-1")
    assert [jobs.find(name).id for name in ("exp", "exp-1-1")] == ["exp-1", "exp-1-1"]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),  # it never came to run
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_that_of_the_job(status: str, code: int | None, expected: int) -> None:
    job = Job("mine-1", "mine", status, "", 0.0, 0.0, code)
    assert job.exit_code == expected


@pytest.mark.usefixtures("quick")
def test_output_is_taken_up_where_the_connection_broke() -> None:
    broken = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    client = FakeClient(
        [details("mine-1", "mine", "PENDING")],
        statuses=[
            "PENDING",
            ConnectionError("refused"),
            "PENDING",
            "RUNNING",
            "RUNNING",
            "SUCCEEDED",
        ],
        texts=[
            ["one\n", "two\n", broken],
            [requests.exceptions.ConnectionError("refused")],
            ["one\ntwo\nthr"],
            ["one\n", "two\nthree\n", "four\n"],
        ],
    )
    written: list[str] = []
    job = Jobs(client, ADDRESS).follow("mine-1", written.append)
    assert "".join(written) == "one\ntwo\nthree\nfour\n"
    assert job.status == "SUCCEEDED"


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(30)
def test_a_connection_that_falls_silent_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was cut off while the laptop slept, of which nobody hears."""
    monkeypatch.setattr(ray_jobs, "_SILENT_SECONDS", 0.05)
    client = FakeClient(
        [details("mine-1", "mine", "RUNNING")],
        statuses=["RUNNING", "RUNNING", "SUCCEEDED"],
        texts=[["one\n", SILENCE], ["one\n", "two\n"]],
    )
    written: list[str] = []
    assert Jobs(client, ADDRESS).follow("mine-1", written.append).status == "SUCCEEDED"
    assert written == ["one\n", "two\n"]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_output_that_cannot_be_written_is_no_fault_of_the_cluster(error: OSError) -> None:
    """As in `ganscale job logs --follow RUN | head`."""

    def write(text: str) -> None:
        raise error

    client = FakeClient([details("mine-1", "mine", "RUNNING")], texts=[["one\n"]])
    with pytest.raises(type(error)) as caught:
        Jobs(client, ADDRESS).follow("mine-1", write)
    assert caught.value is error


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_is_gone_for_good_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_PATIENCE_SECONDS", 0.05)
    client = FakeClient([details("mine-1", "mine", "RUNNING")])
    client.texts = [[ConnectionError("gone")] for _ in range(100_000)]
    with pytest.raises(GanscaleError, match="no Ray dashboard answers at http://head:8265"):
        Jobs(client, ADDRESS).follow("mine-1", lambda text: None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("x"), "no Ray dashboard answers at http://head:8265"),
        (requests.exceptions.ConnectTimeout(), "no Ray dashboard answers"),
        (requests.exceptions.JSONDecodeError("x", "<html>", 0), "is no Ray dashboard"),
        (RuntimeError("Version check returned 404. Please"), "is no Ray dashboard"),
        (AuthenticationError("Authentication required: x"), "wants a token: set RAY_AUTH_MODE"),
        (AuthenticationError("Authentication failed: x"), "does not accept this token"),
        (
            RuntimeError("Request failed with status code 500: Traceback\n  x\nValueError: no\n"),
            "http://head:8265: ValueError: no",
        ),
    ],
)
def test_what_went_wrong_is_one_readable_line(error: Exception, message: str) -> None:
    with pytest.raises(GanscaleError) as caught, readable(ADDRESS):
        raise error
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clone_is_uploaded_without_data_runs_and_environment(tmp_path: Path) -> None:
    """`ray job submit --working-dir .`: what Ray packs of a clone in which somebody has worked."""
    root = Path(__file__).parents[2]
    clone = tmp_path / "clone"
    kept = [".gitignore", "pyproject.toml", "ganscale/data/order.py", "ganscale/config/run.py"]
    litter = [
        "data/cifar10-train/shard-000000.tar",
        "runs/quickstart/checkpoints/nimg-000000000000-a0001/state.safetensors",
        ".venv/lib/python3.11/site-packages/torch/__init__.py",
        ".mypy_cache/3.11/cache.json",
        "ganscale/data/__pycache__/order.cpython-311.pyc",
    ]
    for name in [*kept, *litter]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        is_there = name in kept
        (clone / name).write_bytes((root / name).read_bytes() if is_there else b"litter")
    package = tmp_path / "package.zip"
    excludes = RAY_RUNTIME_ENV_DEFAULT_EXCLUDES.split(",")
    create_package(str(clone), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    assert names == set(kept)
