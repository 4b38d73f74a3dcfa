"""W&B: one run across restarts, in a process of its own, and never in the way of training.

What is logged goes through a pipe to `wandb_process`, and is never waited for: where that process
does not keep up, messages wait in memory, and beyond a limit they are left out and counted. A
server that hangs, refuses or fails costs training nothing; closing waits a stated time at most. The
run's id lies in the run's folder, so a restart goes on with the same W&B run.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import psutil

from ganscale.errors import ConfigError
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import FAULTS, FaultCounts, NullSink, Row

__all__ = ["ARTIFACTS_VARIABLE", "WandbSink", "resolve_mode", "variables"]

ARTIFACTS_VARIABLE = "GANSCALE_WANDB_ARTIFACTS"
"""Which snapshots become artifacts: none (the default), best or all."""

_VARIABLES = (
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_FINISH_TIMEOUT",
    "WANDB_INIT_TIMEOUT",
    "WANDB_JOB_TYPE",
    "WANDB_MODE",
    "WANDB_NOTES",
    "WANDB_RUN_GROUP",
    "WANDB_TAGS",
    ARTIFACTS_VARIABLE,
)

_INIT_SECONDS = 30.0
_FINISH_SECONDS = 20.0
"""For what the server must be asked, and then again for what is to be uploaded."""
_MARGIN_SECONDS = 30.0
"""For starting the process, twice where the second one is to log offline, on a busy machine."""
_PIPE_BYTES = 2**20
_MAX_WAITING_BYTES = 2**26
_ALERTS = ("alarm", "checkpoint_failed", "evaluation_failed", "rollback", "stall")
_NOT_EVALUATED = ("metrics/diversity",)
_EVENT_COLUMNS = ("time", "event", "attempt", "nimg", "step", "message")
_MAX_EVENTS = 500

Artifacts = Literal["none", "best", "all"]


class WandbSink(NullSink):
    """A W&B run that takes rows with their own `step` as the horizontal axis.

    Args:
        run_dir: of the run.
        project: W&B's.
        mode: online or offline.
        config: shown beside the run.
        tell: takes what people should know of W&B, from any thread.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        *,
        project: str,
        mode: str,
        config: Mapping[str, Any],
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        run_dir.root.mkdir(parents=True, exist_ok=True)
        self.run_id = _run_id(run_dir.wandb_run_id)
        self._run_name = run_dir.name
        self._artifacts = _wanted_artifacts()
        self._faults = FaultCounts()
        self._events: list[Row] = []
        self._evaluations: list[Row] = []
        self._place = {"step": 0, "nimg": 0}
        seconds = {
            "init": float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_SECONDS)),
            "finish": float(os.environ.get("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS)),
        }
        self._helper = _Helper(
            run_dir.root / "wandb" / "messages.log",
            closing_seconds=seconds["init"] + 2 * seconds["finish"] + _MARGIN_SECONDS,
            tell=tell,
        )
        self._helper.send(
            mode=mode,
            seconds=seconds,
            pid=os.getpid(),
            init={
                "project": project,
                "name": run_dir.name,
                "id": self.run_id,
                "group": os.environ.get("WANDB_RUN_GROUP", run_dir.name),
                "job_type": os.environ.get("WANDB_JOB_TYPE", "train"),
                "dir": str(run_dir.root),
                "config": dict(config),
            },
        )

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """Take up the counts and the tables."""
        self._evaluations = [row for row in rows if _is_evaluation(row)]
        for event in events:
            if self._faults.add(event):
                self._events.append(event)

    def log(self, row: Row) -> None:
        """Send the row, with the faults so far; an evaluation makes a new table."""
        self._place = {"step": row["step"], "nimg": row["nimg"]}
        counts = {f"faults/{fault}": self._faults[fault] for fault in FAULTS}
        self._helper.send(do="log", row={**row, **counts})
        if _is_evaluation(row):
            self._evaluations.append(row)
            names = sorted({name for row in self._evaluations for name in _figures(row)})
            data = [[row["nimg"], *map(row.get, names)] for row in self._evaluations]
            self._send_table("evaluations", ["nimg", *names], data)

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Send the picture, with its caption."""
        row = {"step": step, "nimg": nimg}
        self._helper.send(do="picture", name=name, path=str(path), row=row)

    def log_snapshot(self, path: Path, *, average: str, nimg: int) -> None:
        """Send the snapshot as a version of the run's model, if that is wished."""
        is_best = average == "best"
        if self._artifacts == "none" or (self._artifacts == "best" and not is_best):
            return
        model = "" if is_best or not average else f"-{average}"
        self._helper.send(
            do="artifact",
            name=f"{self._run_name}{model}",
            path=str(path),
            aliases=["best" if is_best else "latest", f"kimg-{nimg / 1000:g}"],
            metadata={"nimg": nimg, "average": average, "run": self._run_name},
        )

    def event(self, event: Row) -> None:
        """Draw a fault over the curves: its count steps up. What is wrong is an alert too."""
        if not self._faults.add(event):
            return
        self._events.append(event)
        kind = event["event"]
        place = {name: event.get(name, at) for name, at in self._place.items()}
        self._helper.send(do="log", row={**place, f"faults/{kind}": self._faults[kind]})
        self._send_events()
        if kind in _ALERTS:
            self._helper.send(do="alert", title=f"{self._run_name}: {kind}", text=_text(event))

    def close(self) -> None:
        """Finish the run, within the stated time."""
        self._helper.close()

    def _send_events(self) -> None:
        data = [
            [*map(event.get, _EVENT_COLUMNS[:-1]), _text(event)]
            for event in self._events[-_MAX_EVENTS:]
        ]
        self._send_table("events", _EVENT_COLUMNS, data)

    def _send_table(self, name: str, columns: Sequence[str], data: list[Any]) -> None:
        row = self._place
        self._helper.send(do="table", name=name, columns=list(columns), data=data, row=row)


class _Helper:
    """The process that holds the W&B run: started, fed without waiting, ended in bounded time."""

    def __init__(self, log: Path, *, closing_seconds: float, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._closing_seconds = closing_seconds
        self._waiting = bytearray()
        self._num_left_out = 0
        self._is_gone = False
        self._lock = threading.Lock()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ganscale.tracking.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        with suppress(OSError):  # where the limit is lower, it is as it was
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._listener = threading.Thread(target=self._listen, name="wandb", daemon=True)
        self._listener.start()

    def send(self, **message: Any) -> None:
        """Pass on a message, or keep it for later; never waits."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            if self._is_gone:
                return
            if len(self._waiting) + len(line) > _MAX_WAITING_BYTES:
                self._num_left_out += 1
                return
            self._waiting += line
            self._push()

    def close(self) -> None:
        """Wait for the end of the process, or end it."""
        deadline = time.monotonic() + self._closing_seconds
        self.send(do="close")
        while self._waiting and not self._is_gone and time.monotonic() < deadline:
            select.select([], [self._pipe], [], 0.2)
            with self._lock:
                self._push()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._is_gone = True
            self._tell(
                f"W&B did not finish within {self._closing_seconds:g} s, and was left; the run is "
                "whole in metrics.jsonl"
            )
        _kill_tree(self._process)
        self._listener.join(5)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        if self._num_left_out:
            self._tell(f"W&B was too slow: {self._num_left_out} messages were left out")

    def _push(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._pipe, self._waiting)]
        except BlockingIOError:
            pass
        except OSError:
            self._is_gone = True
            self._waiting.clear()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        is_closed, told = False, set[str]()
        for line in self._process.stdout:
            said = json.loads(line)
            is_closed = is_closed or said.get("closed", False)
            message = said.get("message") or said.get("problem")
            if message and message not in told:  # a server that is away is told of once
                told.add(message)
                self._tell(message)
        if not is_closed and not self._is_gone:
            code = self._process.wait()
            self._tell(f"W&B's process ended (code {code}): nothing is logged there any more")


def resolve_mode(setting: str) -> str:
    """What `tracking.wandb` means here: "auto" is online where an API key is known."""
    if setting != "auto":
        return setting
    stated = os.environ.get("WANDB_MODE")
    if stated in ("online", "offline", "disabled"):
        return stated
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def variables() -> dict[str, str]:
    """What is set here of W&B's variables that workers on other machines should have as well."""
    return {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def _wanted_artifacts() -> Artifacts:
    stated = os.environ.get(ARTIFACTS_VARIABLE, "none")
    if stated not in ("none", "best", "all"):
        raise ConfigError(f"{ARTIFACTS_VARIABLE}={stated}: choose none, best or all")
    return stated  # type: ignore[return-value]  # it was just looked at


def _figures(row: Row) -> list[str]:
    return [name for name in row if name.startswith("metrics/") and name not in _NOT_EVALUATED]


def _is_evaluation(row: Row) -> bool:
    return bool(_figures(row))


def _text(event: Row) -> str:
    """An event in words: its message, else its fields."""
    skipped = (*_EVENT_COLUMNS, "where", "samples")
    fields = {k: v for k, v in event.items() if k not in skipped}
    return str(event.get("message") or json.dumps(fields))


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, of which wandb has one that outlives it."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            member.kill()
    process.wait()


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host is not None and netrc(str(path)).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    """The run's, made if there is none; a kill leaves it whole or not there."""
    if not path.is_file() or not path.read_text():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(secrets.token_hex(4))
        temporary.replace(path)
    return path.read_text()
