"""W&B: one run across restarts, and never in the way of training.

`wandb_process` follows the files that a run writes anyway, and remembers how far it came. Training
waits for nothing, and whatever happens to that process, to wandb or to the server, the next process
goes on where it stopped. Closing waits for a stated time at most.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ganscale.atomic_files import write_text
from ganscale.errors import ConfigError
from ganscale.json_lines import append_line, end_of_lines, open_lines
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import NullSink, Row

FILES = "wandb/files.jsonl"
"""In the run's folder: its pictures, a line each."""
FOLLOWED = ("events.jsonl", "metrics.jsonl", FILES)
POSITIONS = "wandb/positions.json"
"""How many bytes of each followed file are in W&B's files."""
NOT_UPLOADED = 3
"""Exit code of the process where the server did not take all of the run in time."""
_MARGIN_SECONDS = 30.0
"""For starting the process and logging what waits, on a busy machine."""
_RESTART_SECONDS = 600.0
"""At least, between two replacements; the first is at once, so that a process that cannot begin, as
with a wrong WANDB_TAGS, is reported soon."""
_PASSED_ON = "BASE_URL ENTITY FINISH_TIMEOUT JOB_TYPE MODE NOTES RUN_GROUP TAGS"
_MODES = {"run": "online", "dryrun": "offline"}
"""Old names that wandb still knows."""


def resolve_mode(setting: str) -> str:
    """What `tracking.wandb` means here: "auto" is online where an API key is known.

    Raises `ConfigError` for a WANDB_MODE that is unknown; wandb's `shared` is not supported.
    """
    if setting != "auto":
        return setting
    if stated := os.environ.get("WANDB_MODE"):
        if (mode := _MODES.get(stated, stated)) not in ("online", "offline", "disabled"):
            raise ConfigError(f"WANDB_MODE={stated!r}: expected online, offline or disabled")
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    with suppress(OSError, ValueError, NetrcParseError):
        host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        if host is not None and netrc(str(path)).authenticators(host) is not None:
            return "online"
    return "offline"


def finish_timeout() -> int:
    """Seconds that closing waits for the upload. Raises `ConfigError` if the variable is wrong."""
    stated = os.environ.get("WANDB_FINISH_TIMEOUT") or "20"
    if not stated.isdecimal():
        raise ConfigError(f"WANDB_FINISH_TIMEOUT={stated!r}: expected a number of seconds")
    return int(stated)


def variables() -> dict[str, str]:
    """What is set here of W&B's variables that workers on other machines should have as well."""
    names = [f"WANDB_{name}" for name in _PASSED_ON.split()]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def begin_wandb_run(run_dir: RunDirectory) -> None:
    """Give a run a new run in W&B, which gets all that the run's files hold already."""
    write_text(run_dir.root / POSITIONS, json.dumps(dict.fromkeys(FOLLOWED, 0)))
    write_text(run_dir.wandb_run_id, secrets.token_hex(4))


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
        timeout = finish_timeout()
        root = run_dir.root
        self._files = open_lines(root / FILES)
        if not run_dir.wandb_run_id.is_file() or not run_dir.wandb_run_id.read_text():
            begin_wandb_run(run_dir)
        elif not (root / POSITIONS).is_file():
            # What is there already was logged by the host that the run comes from.
            positions = {name: end_of_lines(root / name) for name in FOLLOWED}
            write_text(root / POSITIONS, json.dumps(positions))
        self._report = report
        self._log = root / "wandb" / "process.log"
        self._settings: dict[str, Any] = {
            "root": str(root.absolute()),
            "project": project,
            "mode": mode,
            "config": dict(config),
            "upload_seconds": timeout,
            "closing_seconds": timeout + _MARGIN_SECONDS,
            "pid": os.getpid(),
        }
        self._next_replacement = -math.inf
        self._start()

    def log(self, row: Row) -> None:
        """Replace the process if it has ended."""
        if self._process.poll() is not None and time.monotonic() > self._next_replacement:
            self._replace()

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Note the picture for the process."""
        line = {"time": time.time(), "path": str(path), "picture": name, "nimg": nimg}
        try:
            append_line(self._files, line)
        except OSError as error:  # the disk is full; what training needs has been written
            self._report(f"W&B will not have {path}: {error}")

    def close(self) -> None:
        """Let the process finish the run, or end it after the stated time."""
        if self._process.poll() is not None:
            self._replace()
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(b"close", self._settings["closing_seconds"])
        self._process.kill()
        code = self._process.wait()
        if code == NOT_UPLOADED:
            command = f"wandb sync {shlex.quote(str(self._log.parent))}/offline-run-*"
            self._report(f"W&B did not take all of the run in time; to upload it later: {command}")
        elif code:
            self._report(f"{self._how_it_ended(self._process)}; the run is whole in metrics.jsonl")
        self._files.close()

    def _how_it_ended(self, process: subprocess.Popen[bytes]) -> str:
        code = process.returncode  # negative for the signal that killed it
        return f"W&B's process ended too early (code {code}, its log is {self._log})"

    def _replace(self) -> None:
        ended = self._process
        self._next_replacement = time.monotonic() + _RESTART_SECONDS
        try:
            self._start()
        except OSError as error:  # no memory for a process; it is tried again
            self._report(f"W&B's process could not be started: {error}")
            return
        ended.communicate()
        self._report(f"{self._how_it_ended(ended)}: another one goes on where it stopped")

    def _start(self) -> None:
        environment = {
            # wandb refuses some of its variables if they are empty.
            **{name: value for name, value in os.environ.items() if value},
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "WANDB_DIR": self._settings["root"],
        }
        # Of a wandb in the caller's process, whose service ends with it; ours has its own.
        environment.pop("WANDB_SERVICE", None)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.wandb_process", json.dumps(self._settings)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Not in the group of the training process, which a terminal's Ctrl-C or a scheduler
                # kills as a whole: it has the last rows to log.
                start_new_session=True,
                env=environment,
            )
