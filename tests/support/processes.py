"""Processes that begin with everything imported, by being forked from a server that has it.

Importing torch and ganscale takes a core six seconds, which is most of what a small run takes. The
processes are real ones, with a pid, signals and an exit code of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

# As the command sets it before it imports torch, which the server has done when it forks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", "torchvision.io", "ganscale.training.loop"])


class Command:
    """The `ganscale` command with these arguments, with the face of `subprocess.Popen[str]`.

    Its standard output is dropped; `variables` are added to the environment.
    """

    def __init__(self, *arguments: str, variables: Mapping[str, str]) -> None:
        descriptor, name = tempfile.mkstemp(prefix="stderr-")
        os.close(descriptor)
        self._errors = Path(name)
        weakref.finalize(self, os.unlink, name)
        self._process = FORKED.Process(
            target=_main,
            # The server's environment and folder are those of the test that started it.
            args=(arguments, {**os.environ, **variables}, os.getcwd(), name),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"ganscale of pid {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for the end; returns what was written to standard error."""
        self.wait(timeout)
        return None, self._errors.read_text()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    def terminate(self) -> None:
        """SIGTERM, if it still runs."""
        self._process.terminate()


def _main(arguments: tuple[str, ...], variables: dict[str, str], folder: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for path, stream in ((os.devnull, sys.stdout), (errors, sys.stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    from ganscale.cli import main

    main(list(arguments))
