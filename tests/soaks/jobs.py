"""A run as jobs on a cluster of hosts that share nothing but an S3 server.

    sudo -E python -m tests.soaks.jobs --shards data/cifar10-train --kimg 20

Hosts in network namespaces on one switch, each with a disk of its own: `head` has Ray's head with
its dashboard, which asks for a token, and the drivers; `left` and `right` a CPU and a worker each;
an S3 server on `head` has the shards and takes the checkpoints. This process is a host as well,
from which jobs are submitted, and which alone has the server's credentials:

1. `ganscale submit`, ended by `ganscale job stop`;
2. the driver's disk is emptied; `ray job submit --working-dir` of a clone in which somebody has
   worked, `ganscale resume` with the URL of the checkpoints, ended by `ray job stop`;
3. `ganscale submit --no-wait`, one worker killed, followed to the end.

Checked: what a stop leaves is the newest checkpoint, and the next part goes on from it; the sha256
over all tensors is that of an uninterrupted run; the driver's folder has every row once, every
start, stop and fault, the pictures and snapshots that workers on other hosts made, and so has the
copy in S3; each worker's host has its own cache of shards; no planted secret is in any file of any
host, nor in what the jobs API shows. Needs Linux and root.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3

from ganscale.checkpoint import CheckpointStore
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from tests.soaks.runs import add_arguments, newest, small_run, train_undisturbed
from tests.support.hosts import DASHBOARD, DISK, Network
from tests.support.runs import read_rows

S3 = "http://10.77.0.1:5555"
OWN_NETWORK = "GANSCALE_SOAK_NETWORK"
"""In the environment of a process that has left the machine's network."""
STOP_SECONDS = 90
CHECKPOINTS = 3
"""That each part writes before it is stopped."""


class Broken(Exception):
    """A guarantee does not hold."""


def main() -> None:
    """Parse, run, check; exit code 1 if a guarantee failed."""
    arguments = _arguments()
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: sudo -E python -m tests.soaks.jobs ...")
    if OWN_NETWORK not in os.environ:
        os.environ[OWN_NETWORK] = "yes"
        command = ["unshare", "--net", sys.executable, "-m", "tests.soaks.jobs", *sys.argv[1:]]
        os.execvp(command[0], command)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_", "WANDB_"))]:
        del os.environ[name]
    # Where a job's `python` comes from.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hosts = arguments.storage.absolute() / "jobs-hosts"
    if hosts.exists():
        sys.exit(f"{hosts} exists: remove it, or choose another --storage")
    expected = newest(train_undisturbed(arguments))
    token = secrets.token_hex(16)
    # Before the hosts start, which have them from their environment.
    planted = {
        "AWS_ACCESS_KEY_ID": f"planted{secrets.token_hex(8)}",
        "AWS_SECRET_ACCESS_KEY": f"planted{secrets.token_hex(16)}",
    }
    os.environ |= planted
    with Network(hosts, spare=False, token=token) as network:
        network.attach("10.77.0.8")
        with _s3_server(network):
            soak = Soak(network, arguments, token, planted)
            try:
                soak.run()
                soak.check(expected)
            except Broken as broken:
                soak.problems.append(str(broken))
    print(json.dumps(soak.summary(), indent=1))
    if soak.problems:
        sys.exit("broken: " + "; ".join(soak.problems))
    _say("all guarantees hold")


class Soak:
    """The run, in three parts."""

    def __init__(
        self,
        network: Network,
        arguments: argparse.Namespace,
        token: str,
        planted: dict[str, str],
    ) -> None:
        self.network = network
        self.problems: list[str] = []
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._began = time.monotonic()
        self._planted = planted
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self._place = {"AWS_ENDPOINT_URL": S3, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {**self._planted, **self._place, **self._token}
        self._upload(arguments.shards)
        self.config = small_run(
            arguments,
            "jobs",
            storage=f"{DISK}/runs",
            data__shards="s3://soak/shards",
            data__cache_dir=f"{DISK}/cache",
            checkpoint__location="s3://soak/runs",
            tracking__wandb="offline",
            samples__every_kimg=arguments.kimg / 4,
        )
        self._folder = arguments.storage.absolute()
        self._file = self._folder / "jobs.yaml"
        self._file.write_text(self.config.to_yaml())
        self.store = CheckpointStore(self.config.checkpoints)
        self.run_dir = RunDirectory(network.head.disk / "runs" / self.config.name)
        self._stops: list[int] = []

    def run(self) -> None:
        """All parts."""
        self._submitted()
        shutil.rmtree(self.run_dir.root)
        self._submitted_from_a_clone()
        self._submitted_and_killed()

    def check(self, expected: tuple[int, str]) -> None:
        """What must hold at the end; notes what does not."""
        found = newest(self.config)
        self.facts |= {"tensors_sha256": found[1], "expected_sha256": expected[1]}
        self.facts["stopped_at_kimg"] = [nimg / 1000 for nimg in self._stops]
        self._expect(found == expected, "the weights are those of an uninterrupted run")
        starts = [a.start.nimg for a in self.store.attempts() if a.start is not None]
        self._expect(set(self._stops) <= set(starts), "each part goes on from the stop before")
        self._check_documents()
        for host in self.network.nodes:
            cached = [path for path in (host.disk / "cache").rglob("*") if path.is_file()]
            self.facts[f"{host.name}_cached_files"] = len(cached)
            self._expect(bool(cached), f"{host.name} has its own cache of shards")
        self._check_secrets()

    def summary(self) -> dict[str, Any]:
        """Figures."""
        total = round(time.monotonic() - self._began, 1)
        return {**self.facts, "seconds": {**self.seconds, "all": total}, "problems": self.problems}

    def _submitted(self) -> None:
        secret = [word for name in self._planted for word in ("--secret", name)]
        plain = [word for name in self._place for word in ("--env", name)]
        self._submit = ["submit", "--config", str(self._file), *secret, *plain]
        began = time.monotonic()
        follower = self._start("follower.log", *self._submit)
        self._wait(lambda: self._rows(), "to train", follower)
        self._measure("submit_to_training", began)
        again = self._ganscale(*self._submit)
        self._expect(again.returncode == 2, "a run that is alive is refused")
        self._wait(lambda: self._saved() >= CHECKPOINTS, "to save", follower)
        began = time.monotonic()
        stopped = self._ganscale("job", "stop", self.config.name)
        self._measure("stop", began)
        self._expect(stopped.returncode == 0, f"job stop works: {stopped.stderr}")
        self._expect(follower.wait(60) == 143, "the follower ends with the code of a stop")
        self._note_stop()

    def _submitted_from_a_clone(self) -> None:
        variables = {
            **self._place,
            "AWS_ACCESS_KEY_ID": "shown",
            "AWS_SECRET_ACCESS_KEY": "shown",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        }
        with _worked_in_clone(self._folder / "jobs-clone") as clone:
            command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
            command += ["--address", DASHBOARD, "--submission-id", "by-ray", "--no-wait"]
            command += ["--working-dir", ".", "--runtime-env-json"]
            command += [json.dumps({"env_vars": variables}), "--"]
            command += ["python", "-m", "ganscale", "resume", self.config.checkpoints]
            began = time.monotonic()
            subprocess.run(command, check=True, cwd=clone, stdout=subprocess.DEVNULL)
        before = self._saved()
        follower = self._start("by-ray.log", "job", "logs", "by-ray", "--follow")
        self._wait(lambda: self._rows(attempt=2), "to go on from the clone", follower)
        self._measure("ray_submit_to_training", began)
        self._wait(lambda: self._saved() >= before + CHECKPOINTS, "to save", follower)
        stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "by-ray"]
        subprocess.run([*stop, "--address", DASHBOARD], check=True, stdout=subprocess.DEVNULL)
        self._expect(follower.wait(STOP_SECONDS) == 143, "ray job stop ends it in time")
        self._note_stop()

    def _submitted_and_killed(self) -> None:
        self._expect(self._ganscale(*self._submit, "--no-wait").returncode == 0, "it is accepted")
        follower = self._start("rest.log", "job", "logs", self.config.name, "--follow")
        self._wait(lambda: self._rows(attempt=3), "to go on", follower)
        workers = [p for host in self.network.nodes for p in host.processes("RayTrainWorker")]
        self.facts["workers_on_hosts"] = [
            len(host.processes("RayTrainWorker")) for host in self.network.nodes
        ]
        began = time.monotonic()
        workers[0].kill()
        self._wait(lambda: self._rows(attempt=4), "to go on after a kill", follower)
        self._measure("kill_to_training", began)
        self._expect(follower.wait(1800) == 0, "it comes to its end")

    def _check_documents(self) -> None:
        rows = [row["nimg"] for row in History.read(self.run_dir).rows]
        every = round(1000 * self.config.tracking.log_every_kimg)
        total = self.config.total_nimg
        due = sorted({*range(every, total, every), total})
        self._expect(rows == due, f"the driver's folder has every row once: {len(rows)} rows")
        kinds = [event["event"] for event in read_rows(self.run_dir.events)]
        self.facts["events"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        wanted = {"start": 1, "resume": 3, "stop": 2, "fault": 1, "end": 1}
        self._expect(
            wanted.items() <= self.facts["events"].items(), f"the driver's folder has {wanted}"
        )
        self._expect(self.run_dir.snapshot(total).is_file(), "a snapshot is there")
        last = self.run_dir.sample_grid(total)
        self._expect(last.is_file(), "a picture is there")
        client = boto3.client("s3")
        prefix = f"runs/documents/{self.config.name}/"
        listing = client.list_objects_v2(Bucket="soak", Prefix=prefix)["Contents"]
        copied = {item["Key"].removeprefix(prefix): item["Size"] for item in listing}
        for path in (self.run_dir.metrics, self.run_dir.events, last):
            name = path.relative_to(self.run_dir.root).as_posix()
            self._expect(copied.get(name) == path.stat().st_size, f"S3 has {name} as well")
        first = self.run_dir.sample_grid(0).relative_to(self.run_dir.root).as_posix()
        self._expect(first in copied, "S3 has pictures of the first part, whose driver is gone")
        self.facts["documents_in_s3"] = len(copied)

    def _check_secrets(self) -> None:
        headers = {"Authorization": f"Bearer {self._token['RAY_AUTH_TOKEN']}"}
        with urlopen(Request(f"{DASHBOARD}/api/jobs/", headers=headers), timeout=30) as answer:
            shown = answer.read().decode()
        files = [
            path
            for root in (self._hosts, self._folder)
            for path in root.rglob("*")
            if path.is_file() and not path.is_symlink()
        ]
        self.facts["files_searched"] = len(files)
        for name, value in self._planted.items():
            self._expect(value not in shown, f"{name} is not in what the jobs API shows")
            found = [str(path) for path in files if value.encode() in path.read_bytes()]
            self._expect(not found, f"{name} is in no file, not in {found}")

    @property
    def _hosts(self) -> Path:
        return self.network.head.folder.parent

    def _upload(self, shards: Path) -> None:
        client = boto3.client("s3")
        client.create_bucket(Bucket="soak")
        for path in shards.iterdir():
            client.upload_file(str(path), "soak", f"shards/{path.name}")

    def _rows(self, attempt: int = 1) -> bool:
        """Whether rows of an attempt, or of a later one, have come to the driver's folder."""
        rows = read_rows(self.run_dir.metrics)[-1:]
        return any(row["attempt"] >= attempt for row in rows)

    def _saved(self) -> int:
        """How many checkpoints there have been, since those of the past are deleted."""
        newest = self.store.lineage()[:1]
        every = 1000 * self.config.checkpoint.every_kimg
        return int(newest[0].nimg / every) if newest else 0

    def _note_stop(self) -> None:
        """The position of the stop is in the driver's folder, and the newest checkpoint is it."""
        stop = [row for row in read_rows(self.run_dir.events) if row["event"] == "stop"][-1]
        self._expect(newest(self.config)[0] == stop["nimg"], "a stop leaves a checkpoint")
        self._expect(stop["nimg"] < self.config.total_nimg, "it was stopped before its end")
        self._stops.append(stop["nimg"])
        _say(f"stopped at {stop['nimg'] / 1000:g} kimg")

    def _wait(
        self, what: Callable[[], object], aim: str, follower: subprocess.Popen[bytes]
    ) -> None:
        deadline = time.monotonic() + 600
        while not what():
            if follower.poll() is not None:
                raise Broken(f"the job ended before it was seen {aim}")
            if time.monotonic() > deadline:
                raise Broken(f"not seen {aim} in 300 s")
            time.sleep(0.2)

    def _ganscale(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ganscale", *arguments, "--address", DASHBOARD]
        return subprocess.run(command, capture_output=True, text=True)

    def _start(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._hosts / log).open("wb") as file:
            command = [sys.executable, "-m", "ganscale", *arguments, "--address", DASHBOARD]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def _expect(self, holds: bool, guarantee: str) -> None:
        if not holds:
            self.problems.append(f"not so: {guarantee}")
            _say(self.problems[-1])

    def _measure(self, name: str, began: float) -> None:
        self.seconds[name] = round(time.monotonic() - began, 1)
        _say(f"{name.replace('_', ' ')}: {self.seconds[name]:.1f} s")


@contextmanager
def _s3_server(network: Network) -> Iterator[None]:
    """On the head's host, for all."""
    command = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "5555"]
    server = network.head.start(command, "s3.log")
    deadline = time.monotonic() + 600
    while True:
        try:
            urlopen(S3, timeout=5).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    yield
    server.kill()
    server.wait()


@contextmanager
def _worked_in_clone(clone: Path) -> Iterator[Path]:
    """This project's files, with data, runs and an environment larger than Ray takes."""
    root = Path(__file__).parents[2]
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda name: (root / name).is_file(), names.splitlines()):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, clone / name)
    for name in ("data/big.tar", "runs/x/checkpoints/big", ".venv/lib/big.so"):
        (clone / name).parent.mkdir(parents=True)
        with (clone / name).open("wb") as file:
            file.truncate(2**30)
    yield clone
    shutil.rmtree(clone)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
