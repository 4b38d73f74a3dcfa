"""W&B: one run across restarts, in a process of its own, and never in the way of training.

What is logged goes through a pipe to `wandb_process`, and training never waits for it: if that
process does not keep up, messages wait in memory, and beyond a limit they are dropped and counted.
A server that hangs, refuses or fails costs training nothing; closing waits for a stated time at
most. The run's id lies in the run's folder, so a restart continues the same W&B run. metrics.jsonl
has every row in any case.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from ganscale.atomic_files import write_text
from ganscale.json_lines import encode_line
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import FAULTS, FaultCounts, NullSink, Row
from ganscale.tracking.wandb_settings import (
    artifacts_to_log,
    check_run_id,
    helper_environment,
    resolve_mode,
    timeout_seconds,
    variables,
)

__all__ = ["WandbSink", "resolve_mode", "variables"]

_MARGIN_SECONDS = 30.0
"""For starting the process, twice where the second one is to log offline, on a busy machine."""
_MAX_STARTS = 3
"""Processes of one run, the first included: a limit where each of them ends at once."""
_PUSH_SECONDS = 0.05
# The most that Linux gives an unprivileged process: in it, rows wait without our help.
_PIPE_BYTES = 2**20
_MAX_WAITING_BYTES = 2**26
_ALERTS = ("alarm", "checkpoint_failed", "evaluation_failed", "rollback", "stall")
_NOT_EVALUATED = ("metrics/diversity",)
_EVENT_COLUMNS = ("time", "event", "attempt", "nimg", "step", "message")
_MAX_EVENTS = 500


class WandbSink(NullSink):
    """A W&B run that takes rows with their own `step` as the horizontal axis.

    Args:
        run_dir: of the run.
        project: W&B's.
        mode: online or offline.
        config: shown beside the run.
        report: takes messages about W&B for the user, from any thread.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        *,
        project: str,
        mode: str,
        config: Mapping[str, Any],
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        run_dir.root.mkdir(parents=True, exist_ok=True)
        self.run_id = _run_id(run_dir.wandb_run_id)
        self._run_name = run_dir.name
        self._artifacts = artifacts_to_log()
        self._faults = FaultCounts()
        self._events: list[Row] = []
        self._evaluations: list[Row] = []
        self._place = {"step": 0, "nimg": 0}
        seconds = {
            "init": timeout_seconds("WANDB_INIT_TIMEOUT"),
            "finish": timeout_seconds("WANDB_FINISH_TIMEOUT"),
        }
        self._helper = _Helper(
            run_dir.root / "wandb" / "messages.log",
            settings={
                "mode": mode,
                "seconds": seconds,
                "pid": os.getpid(),
                "init": {
                    "project": project,
                    "name": run_dir.name,
                    "id": self.run_id,
                    "group": os.environ.get("WANDB_RUN_GROUP") or run_dir.name,
                    "job_type": os.environ.get("WANDB_JOB_TYPE") or "train",
                    "dir": str(run_dir.root),
                    "config": dict(config),
                },
            },
            closing_seconds=seconds["init"] + 2 * seconds["finish"] + _MARGIN_SECONDS,
            report=report,
        )

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """Continue the counts and the tables of earlier attempts."""
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
        """Send the snapshot as a version of the run's model, if the user asked for that."""
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
        """Draw a fault over the curves, where its count steps up; send alerts of severe ones."""
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
    """The process that holds the W&B run: started, fed without waiting, ended in bounded time.

    If it ends before it is closed, another process begins an offline run for what comes from then
    on; what the first one had not read is lost. At most `_MAX_STARTS` processes are started.

    Args:
        log: takes what the process and wandb write on standard error.
        settings: for `wandb_process`, as it describes them.
        closing_seconds: how long `close` waits.
        report: takes messages for the user, from any thread.
    """

    def __init__(
        self,
        log: Path,
        *,
        settings: Mapping[str, Any],
        closing_seconds: float,
        report: Callable[[str], None],
    ) -> None:
        self._log = log
        self._settings = settings
        self._closing_seconds = closing_seconds
        self._notify = report
        self._waiting = bytearray()
        self._is_mid_message = False
        self._num_left_out = 0
        self._num_starts = 0
        self._is_closing = False
        self._is_gone = False
        self._ended = threading.Event()
        self._lock = threading.Lock()
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._start(settings["mode"])

    def send(self, **message: Any) -> None:
        """Pass on a message, or keep it for later; never waits."""
        line = encode_line(message)
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
        with self._lock:
            self._is_closing = True
        self.send(do="close")
        while not self._ended.wait(_PUSH_SECONDS) and time.monotonic() < deadline:
            with self._lock:
                self._push()
        if not self._ended.is_set():
            with self._lock:
                self._is_gone = True
            self._report(
                f"W&B did not finish within {self._closing_seconds:g} s, and was left; the run is "
                "whole in metrics.jsonl"
            )
        _kill_tree(self._process)
        self._listener.join(5)
        _close_pipes(self._process)
        if self._num_left_out:
            self._report(f"W&B was too slow: {self._num_left_out} messages were left out")

    def _report(self, message: str) -> None:
        # The message is written to a file; a full disk must not end the thread that reports.
        with suppress(OSError):
            self._notify(message)

    def _start(self, mode: str) -> None:
        """Begin a process, and a run in it; holds the lock."""
        self._num_starts += 1
        # Before what is waiting, which a new process must not read without its settings.
        self._waiting[:0] = encode_line({**self._settings, "mode": mode})
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ganscale.tracking.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Not in the group of the training process, which a terminal's Ctrl-C or a scheduler
                # kills as a whole: it has the last rows to log.
                start_new_session=True,
                env={
                    **helper_environment(),
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
            )
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        # A write to a full pipe returns at once instead of waiting for a process that hangs.
        os.set_blocking(pipe, False)
        with suppress(OSError):  # where the limit is lower, it is as it was
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._listener = threading.Thread(
            target=self._listen, args=(self._process,), name="wandb", daemon=True
        )
        self._listener.start()
        self._push()

    def _push(self) -> None:
        """Write what the pipe takes; holds the lock."""
        assert self._process.stdin is not None
        # A broken pipe is left to the listener, which hears of the process's end, and then
        # decides what becomes of the waiting messages.
        with suppress(BlockingIOError, BrokenPipeError):
            while self._waiting and not self._is_gone:
                num = os.write(self._process.stdin.fileno(), self._waiting)
                self._is_mid_message = self._waiting[num - 1 : num] != b"\n"
                del self._waiting[:num]

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what a process answers, and see to its end."""
        assert process.stdout is not None
        reported = set[str]()
        is_closed, is_hopeless, failure = False, False, ""
        for line in process.stdout:
            answer = json.loads(line)
            is_closed = is_closed or answer.get("closed", False)
            failure = answer.get("failure", failure)
            is_hopeless = is_hopeless or answer.get("hopeless", False)
            message = answer.get("message") or answer.get("problem")
            if message and message not in reported:  # a server that is away is reported once
                reported.add(message)
                self._report(message)
        if not is_closed:
            self._replace(process, failure, is_hopeless=is_hopeless)
        if process is self._process:
            self._ended.set()

    def _replace(
        self, process: subprocess.Popen[bytes], failure: str, *, is_hopeless: bool
    ) -> None:
        """Go on offline, in another process, after one that has ended by itself."""
        code = process.wait()
        why = failure or (
            f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        )
        with self._lock:
            if self._is_gone:
                return  # `close` has ended it
            can_restart = self._num_starts < _MAX_STARTS and not is_hopeless
            if can_restart:
                if self._is_mid_message:  # the rest of a message of which the old one has the start
                    del self._waiting[: self._waiting.index(b"\n") + 1]
                if self._is_closing and not self._waiting.endswith(_CLOSE):
                    self._waiting += _CLOSE
                _close_pipes(process)
                self._start("offline")
            else:
                self._is_gone = True
                self._waiting.clear()
        what = f"W&B's process ended ({why}; its log is {self._log})"
        if can_restart:
            self._report(
                f"{what}: from here on the run is logged offline and can be uploaded later: "
                f"wandb sync {self._settings['init']['dir']}/wandb/offline-run-*"
            )
        else:
            self._report(f"{what}: nothing is logged there any more; the run is in metrics.jsonl")


def _figures(row: Row) -> list[str]:
    return [name for name in row if name.startswith("metrics/") and name not in _NOT_EVALUATED]


def _is_evaluation(row: Row) -> bool:
    return bool(_figures(row))


def _text(event: Row) -> str:
    """An event in words: its message, else its fields."""
    skipped = (*_EVENT_COLUMNS, "where", "samples")
    fields = {k: v for k, v in event.items() if k not in skipped}
    return str(event.get("message") or json.dumps(fields))


_CLOSE = encode_line({"do": "close"})


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            assert pipe is not None
            pipe.close()


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, of which wandb has one that outlives it."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            member.kill()
    process.wait()


def _run_id(path: Path) -> str:
    """The id in the file, which is made if there is none."""
    if not path.is_file() or not path.read_text():
        write_text(path, secrets.token_hex(4))
    run_id = path.read_text()
    check_run_id(run_id, str(path))
    return run_id
