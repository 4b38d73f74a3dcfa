"""Jobs on a real Ray head that asks for a token: stopped, gone on with, and secrets not shown."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.cluster import JobsHead
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all

TOKEN = "a-token-of-the-cluster"
PLANTED = {
    "AWS_ACCESS_KEY_ID": "planted-key-91f3",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-5d20",
    "WANDB_API_KEY": "0123456789planted77aa0123456789planted77",
}
SETTINGS = {
    "training__total_kimg": 1.6,
    "checkpoint__every_kimg": 0.32,
    "checkpoint__snapshot_every_kimg": 0.032,
    "launch__num_workers": 1,  # test_ray has two
    "tracking__wandb": "offline",
    "checkpoint__location": "s3://runs/of-mine",
}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An endpoint with a bucket; this process may use it, what it starts has no credentials."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        client = boto3.client("s3")
        client.create_bucket(Bucket="runs")
        client.close()
        yield url
    moto.stop()


@pytest.fixture(scope="module")
def head(s3: str) -> Iterator[JobsHead]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder,
    ):
        for name in (*PLANTED, "AWS_ENDPOINT_URL", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        head = JobsHead(Path(folder), TOKEN, 2, secrets=PLANTED, AWS_ENDPOINT_URL=s3)
        patch.undo()
        with head:
            yield head


def _write(config: Config) -> str:
    file = config.run_dir.parent / "job.yaml"
    file.write_text(config.to_yaml())
    return str(file)


def _wait(what: Callable[[], object], follower: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not what():
        assert follower.poll() is None, follower.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def _files_with(text: str, *roots: Path) -> list[Path]:
    """Files whose bytes hold the text, anywhere below the folders."""
    paths = (path for root in roots for path in root.rglob("*"))
    files = (path for path in paths if path.is_file() and not path.is_symlink())
    return [path for path in files if text.encode() in path.read_bytes()]


@pytest.mark.timeout(900)  # a head, a job and its workers start one after the other
def test_a_stopped_job_leaves_a_checkpoint_and_shows_no_secret(
    make_config: MakeConfig, head: JobsHead, s3: str
) -> None:
    config = make_config(name="mine", launch__backend="ray", **SETTINGS)
    output = _train_and_stop(head, config)
    (stop,) = [e for e in _events(config) if e["event"] == "stop"]
    assert final_digest(config)[0] == stop["nimg"] < config.total_nimg

    # What the driver's folder shows lies beside the checkpoints as well.
    names = {path.name for path in (config.run_dir / "snapshots").iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3)
        client = boto3.client("s3")
        listing = client.list_objects_v2(Bucket="runs", Prefix="of-mine/documents/mine/")
        client.close()
    copied = {item["Key"].removeprefix("of-mine/documents/mine/") for item in listing["Contents"]}
    assert {f"snapshots/{name}" for name in names} <= copied
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "wandb_run_id"} <= copied

    headers = {"Authorization": f"Bearer {TOKEN}"}
    with urlopen(Request(f"{head.url}/api/jobs/", headers=headers), timeout=30) as answer:
        shown = answer.read().decode()
    assert json.loads(shown)[0]["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == s3
    for value in PLANTED.values():
        assert value not in shown + output
        assert _files_with(value, head.folder, config.run_dir.parent) == []
    # The search finds what is there.
    assert _files_with("start at", head.folder)
    assert _files_with(s3, head.folder)
    assert [path for path in config.run_dir.rglob("*.wandb") if path.stat().st_size > 1000]

    # Any other start goes on with it, to the bits of a run that was left alone.
    expected = make_config(name="torchrun", **{**SETTINGS, "checkpoint__location": None})
    wait_all(start_ranks(expected, 1))
    wait_all(start_ranks(config.with_changes({"launch.backend": "inprocess"}), 1))
    assert final_digest(config) == final_digest(expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stopped_job_is_gone_on_with_by_the_next_and_there_is_one_at_a_time(
    make_config: MakeConfig, head: JobsHead
) -> None:
    settings = {**SETTINGS, "checkpoint__location": None}
    config = make_config(name="again", launch__backend="ray", **settings)
    output = _train_and_stop(head, config)
    (stop,) = [e for e in _events(config) if e["event"] == "stop"]

    submit = _submit(config)
    assert head.call(*submit, "--no-wait").stdout.startswith("job again-2 at")
    refused = head.call(*submit)
    assert refused.returncode == 2
    assert "again is on this cluster already, as job again-2 (" in refused.stderr
    expected = make_config(name="torchrun", **settings)
    wait_all(start_ranks(expected, 1))
    rest = head.call("job", "logs", "again", "--follow")
    assert rest.returncode == 0, rest.stdout
    assert f"resume at {stop['nimg'] / 1000:g} kimg: 1 worker" in rest.stdout
    assert final_digest(config) == final_digest(expected)
    for value in PLANTED.values():
        assert value not in output + rest.stdout
        assert _files_with(value, head.folder, config.run_dir.parent) == []


def _submit(config: Config) -> list[str]:
    secret = [word for name in PLANTED for word in ("--secret", name)]
    return ["submit", "--config", _write(config), "--env", "AWS_ENDPOINT_URL", *secret]


def _train_and_stop(head: JobsHead, config: Config) -> str:
    """Submit the run and stop its job when it trains; what the submission printed."""
    run_dir = RunDirectory(config.run_dir)
    follower = head.start(*_submit(config))
    _wait(lambda: len(read_rows(run_dir.metrics)) > 5, follower)
    stopped = head.call("job", "stop", config.name)
    assert stopped.returncode == 0, stopped.stderr
    assert "STOPPED" in stopped.stdout
    output, _ = follower.communicate(timeout=600)
    assert follower.returncode == 143, output
    (stop,) = [e for e in _events(config) if e["event"] == "stop"]
    assert f"stopped at {stop['nimg'] / 1000:g} of 1.6 kimg" in stopped.stdout
    return output


def _events(config: Config) -> list[dict[str, Any]]:
    return read_rows(RunDirectory(config.run_dir).events)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "another"}, "does not accept this token"),
    ],
)
def test_without_the_token_nothing_is_done(
    head: JobsHead, variables: dict[str, Any], message: str
) -> None:
    refused = head.call("job", "list", **variables)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow  # test_jobs_api has the exit code, without a cluster
def test_a_job_that_fails_gives_its_exit_code(make_config: MakeConfig, head: JobsHead) -> None:
    """Shards that are nowhere: told by the driver, before any worker starts."""
    config = make_config(name="lost", launch__backend="ray", data__shards="/nowhere/shards")
    failed = head.call("submit", "--config", _write(config))
    assert failed.returncode == 1
    assert "/nowhere/shards" in failed.stdout
    assert "job lost-1 FAILED" in failed.stderr
    assert not os.path.exists(config.run_dir)
