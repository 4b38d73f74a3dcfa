"""A Ray head on this machine with its dashboard and a token, and the command's jobs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from tests.support.ranks import free_port


class JobsHead:
    """A head with its own ports and folder while the block runs.

    Args:
        folder: short, since Ray makes sockets in it.
        token: what it asks of those who want something.
        secrets: of the head's environment, which submitters do not have.
        variables: of submitters' environment, which the head does not have.
    """

    def __init__(
        self,
        folder: Path,
        token: str,
        num_cpus: int,
        *,
        secrets: Mapping[str, str] | None = None,
        **variables: str,
    ) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self._num_cpus = num_cpus
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of a job's `python`
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        own = {**os.environ, "PATH": path, **auth}
        self._own = {**own, **(secrets or {})}
        self.environment = {**own, **variables}

    def __enter__(self) -> Self:
        options = {
            "port": free_port(),
            "dashboard-port": self.url.rpartition(":")[2],
            "num-cpus": self._num_cpus,
            "object-store-memory": 100_000_000,
            "include-dashboard": "true",
            "ray-client-server-port": free_port(),
            # Given, since Ray's daemon waits 15 s for those that its agents choose, then dies.
            "dashboard-agent-listen-port": free_port(),
            "dashboard-agent-grpc-port": free_port(),
            "metrics-export-port": free_port(),
            "runtime-env-agent-port": free_port(),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (self.folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(
                command,
                env={**self._own, "RAY_TMPDIR": str(self.folder), "RAY_worker_niceness": "0"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 600
        while self.call("job", "list").returncode != 0:
            assert self._head.poll() is None, (self.folder / "head.log").read_text()
            assert time.monotonic() < deadline, "the dashboard does not answer"
        return self

    def __exit__(self, *_: object) -> None:
        for process in psutil.Process(self._head.pid).children(recursive=True):
            process.kill()
        self._head.kill()
        self._head.wait()

    def call(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            self._command(*arguments),
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command; its output is one pipe."""
        return subprocess.Popen(
            self._command(*arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ganscale", *arguments, "--address", self.url]
