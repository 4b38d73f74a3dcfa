"""W&B: one run across restarts, and never in the way of training.

`wandb_process` follows the files that a run writes anyway, and remembers how far it came. Training
waits for nothing, and whatever happens to that process, to wandb or to the server, the next process
goes on where it stopped. Closing waits for a stated time at most.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ganscale.atomic_files import write_text
from ganscale.json_lines import append_line, end_of_lines, open_lines
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import NullSink, Row
from ganscale.tracking.wandb_settings import resolve_mode, seconds, variables

__all__ = ["FILES", "FOLLOWED", "POSITIONS", "WandbSink", "resolve_mode", "variables"]

FILES = "wandb/files.jsonl"
"""In the run's folder: its pictures and snapshots, a line each."""
FOLLOWED = ("events.jsonl", "metrics.jsonl", FILES)
POSITIONS = "wandb/positions.json"
"""How many bytes of each followed file are in W&B's files."""
_MARGIN_SECONDS = 30.0
"""For starting the process and logging what waits, on a busy machine."""
_RESTART_SECONDS = 600.0
"""At least, between the starts of two processes."""


class WandbSink(NullSink):
    """The run in W&B: `mode` is online or offline, `report` takes messages for the user."""

    def __init__(
        self,
        run_dir: RunDirectory,
        *,
        project: str,
        mode: str,
        config: Mapping[str, Any],
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        root = run_dir.root
        self._files = open_lines(root / FILES)
        if not (root / POSITIONS).is_file():
            # What is there already was logged by the host that the run comes from.
            positions = {name: end_of_lines(root / name) for name in FOLLOWED}
            write_text(root / POSITIONS, json.dumps(positions))
        if not run_dir.wandb_run_id.is_file() or not run_dir.wandb_run_id.read_text():
            write_text(run_dir.wandb_run_id, secrets.token_hex(4))
        self._report = report
        self._log = root / "wandb" / "process.log"
        self._closing_seconds = seconds("WANDB_FINISH_TIMEOUT") + _MARGIN_SECONDS
        self._settings: dict[str, Any] = {
            "root": str(root.absolute()),
            "project": project,
            "mode": mode,
            "config": dict(config),
            "closing_seconds": self._closing_seconds,
            "pid": os.getpid(),
        }
        self._start()

    def log(self, row: Row) -> None:
        """Pass on what the process has to say, and replace it if it has ended."""
        assert self._process.stdout is not None
        with suppress(BlockingIOError):  # which is how a pipe says that it has nothing
            self._pass_on(os.read(self._process.stdout.fileno(), 2**16))
        if self._process.poll() is not None and time.monotonic() > self._next_start:
            self._replace()

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Note the picture for the process."""
        self._note(path, picture=name, nimg=nimg)

    def log_snapshot(self, path: Path, *, average: str, nimg: int) -> None:
        """Note the snapshot for the process."""
        self._note(path, average=average, nimg=nimg)

    def close(self) -> None:
        """Let the process finish the run, or end it after the stated time."""
        if self._process.poll() is not None:
            self._replace()
        try:
            said, _ = self._process.communicate(b"close", timeout=self._closing_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, _ = self._process.communicate()
        self._pass_on(said)
        if self._process.returncode:
            self._report(f"{self._how_it_ended(self._process)}; the run is whole in metrics.jsonl")
        self._files.close()

    def _note(self, path: Path, **what: Any) -> None:
        try:
            append_line(self._files, {"time": time.time(), "path": str(path), **what})
        except OSError as error:  # the disk is full; what training needs has been written
            self._report(f"W&B will not have {path}: {error}")

    def _pass_on(self, said: bytes) -> None:
        for line in said.decode().splitlines():
            self._report(line)

    def _how_it_ended(self, process: subprocess.Popen[bytes]) -> str:
        code = process.returncode  # negative for the signal that killed it
        return f"W&B's process ended too early (code {code}, its log is {self._log})"

    def _replace(self) -> None:
        ended = self._process
        try:
            self._start()
        except OSError as error:  # no memory for a process; it is tried again
            self._report(f"W&B's process could not be started: {error}")
            return
        said, _ = ended.communicate()
        self._pass_on(said)
        self._report(f"{self._how_it_ended(ended)}: another one goes on where it stopped")

    def _start(self) -> None:
        self._next_start = time.monotonic() + _RESTART_SECONDS
        environment = {
            # wandb refuses some of its variables if they are empty.
            **{name: value for name, value in os.environ.items() if value},
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "WANDB_DIR": self._settings["root"],
        }
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.wandb_process", json.dumps(self._settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Not in the group of the training process, which a terminal's Ctrl-C or a scheduler
                # kills as a whole: it has the last rows to log.
                start_new_session=True,
                env=environment,
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
