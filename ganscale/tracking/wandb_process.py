"""The process that logs a run to W&B, so that nothing W&B does can hold or harm training.

    python -m ganscale.tracking.wandb_process SETTINGS < pipe

It logs the files of the run's folder to an offline run, for which wandb asks no server, and notes
how far it came: its successor logs the last second before a kill once more. If the mode is online,
a thread uploads that run while it grows, with `wandb beta sync --live`.

SETTINGS is JSON that `WandbSink` makes. Anything on standard input says that the run has ended; an
end without it, that training was killed. The exit code says whether W&B has all of the run.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import wandb
from filelock import FileLock
from wandb.cli.cli import cli

from ganscale.atomic_files import write_bytes
from ganscale.json_lines import end_of_lines, parse_lines
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import FAULTS, FaultCounts, Row
from ganscale.tracking.wandb_sink import NOT_UPLOADED, POSITIONS

_POLL_SECONDS = 1.0
_FLUSH_SECONDS = 0.05
"""wandb's own default of 15 s delays the curves, and loses as much to a kill."""
_RETRY_SECONDS = 60.0
"""Between two uploads, where the first one ended too early."""


def main() -> int:
    """Serve one run, to its close or the other side's end; returns the exit code."""
    # Schedulers such as Slurm send these to all processes of a job. This one still has rows to log
    # then, and ends when the training process does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(sys.argv[1])
    root = Path(settings["root"])
    # That of an attempt which was killed may still be logging its last rows, and both would log
    # them. Held until this process ends.
    FileLock(root / "wandb" / ".lock").acquire()
    run = _offline_run(settings)
    folder = Path(run.settings.sync_dir)
    core = next(child for child in psutil.Process().children() if child.name() == "wandb-core")
    log = RunLog(root, run)
    ending = threading.Event()
    upload = threading.Thread(target=_upload, args=(folder, ending), daemon=True)
    if settings["mode"] == "online":
        upload.start()
    while not select.select([0], [], [], _POLL_SECONDS)[0]:
        # Only now is it certain that what was logged a second ago is in wandb's file: a row that
        # is sent to wandb-core while that dies goes unnoticed.
        if core.status() == psutil.STATUS_ZOMBIE:
            raise ConnectionError("wandb-core has ended")
        log.keep_positions()
        log.log_new()
    is_closed = bool(os.read(0, 1))
    signal.alarm(math.ceil(settings["closing_seconds"]))  # which ends what hangs from here on
    log.log_new()
    run.finish(exit_code=0 if is_closed else 1)
    # After a kill the upload is left to the next process, which may have begun.
    if upload.is_alive() and is_closed:
        ending.set()
        upload.join(settings["upload_seconds"])
    if upload.is_alive():
        time.sleep(_POLL_SECONDS)  # for the end of the file, as above
        core.kill()
    else:
        wandb.teardown()  # which writes the end of the file
    log.keep_positions()
    return NOT_UPLOADED if settings["mode"] == "online" and not _is_uploaded(folder) else 0


def _offline_run(settings: Mapping[str, Any]) -> Any:
    """An offline run with `nimg` as the horizontal axis."""
    run_dir = RunDirectory(Path(settings["root"]))
    run = wandb.init(
        project=settings["project"],
        config=settings["config"],
        name=run_dir.name,
        id=run_dir.wandb_run_id.read_text(),
        group=os.environ.get("WANDB_RUN_GROUP") or run_dir.name,
        job_type=os.environ.get("WANDB_JOB_TYPE") or "train",
        mode="offline",
        resume="allow",
        settings=wandb.Settings(
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
            x_stats_pid=settings["pid"],
            x_label="rank-0",
            silent=True,
            console="off",
        ),
    )
    # Not wandb's counter of rows, which cannot go back as a run does that resumes earlier.
    run.define_metric("nimg")
    run.define_metric("*", step_metric="nimg")
    return run


class RunLog:
    """Logs the files of the folder `root` to a W&B run."""

    def __init__(self, root: Path, run: Any) -> None:
        self._root = root
        self._run = run
        self._positions = self._kept = json.loads((root / POSITIONS).read_text())
        self._nimg = 0
        self._faults = FaultCounts()
        for event in self._lines("events.jsonl", 0, self._positions["events.jsonl"]):
            self._faults.add(event)

    def log_new(self) -> None:
        """Log what has come since; raises `ConnectionError` if wandb-core has ended."""
        ends = {name: end_of_lines(self._root / name, at) for name, at in self._positions.items()}
        lines = [
            x for name, at in self._positions.items() for x in self._lines(name, at, ends[name])
        ]
        # Events are first in `FOLLOWED`, and their time is rounded.
        for line in sorted(lines, key=lambda line: round(line.get("time") or line["time/unix"], 3)):
            try:
                self._log(line)
            except ConnectionError:
                raise
            except Exception:  # a picture has been deleted; wandb raises what it likes
                traceback.print_exc()
        self._positions = ends

    def keep_positions(self) -> None:
        """Note that all that was logged until now need not be logged again."""
        if self._positions != self._kept:
            write_bytes(self._root / POSITIONS, json.dumps(self._positions).encode(), fsync=False)
            self._kept = self._positions

    def _lines(self, name: str, start: int, end: int) -> list[dict[str, Any]]:
        if start == end:
            return []
        with (self._root / name).open("rb") as file:
            file.seek(start)
            return parse_lines(file.read(end - start))

    def _log(self, line: Row) -> None:
        if "picture" in line:
            picture = wandb.Image(line["path"], caption=f"{line['nimg'] / 1000:g} kimg")
            self._run.log({line["picture"]: picture, "nimg": line["nimg"]})
        elif "event" not in line:
            self._nimg = line["nimg"]
            counts = {f"faults/{kind}": self._faults[kind] for kind in FAULTS}
            self._run.log({**{k: v for k, v in line.items() if v is not None}, **counts})
        elif self._faults.add(line):  # drawn over the curves, where its count steps up
            count = self._faults[line["event"]]
            row = {f"faults/{line['event']}": count, "nimg": line.get("nimg", self._nimg)}
            self._run.log(row)


def _upload(folder: Path, ending: threading.Event) -> None:
    """Upload an offline run while it grows, after those of earlier attempts.

    wandb itself goes on asking a server that hangs, refuses or fails. What it gives up, such as a
    key that is not accepted, is tried again after a pause.
    """
    others = set(folder.parent.glob(f"offline-run-*-{folder.name.rpartition('-')[2]}")) - {folder}
    while not _is_uploaded(folder):
        with suppress(Exception, SystemExit):  # it is in the process's log
            # First, and to their end: the server counts rows on from there.
            if waiting := [str(other) for other in sorted(others) if not _is_uploaded(other)]:
                cli(["sync", *waiting], standalone_mode=False)
            if all(map(_is_uploaded, others)):
                cli(["beta", "sync", "--live", str(folder)], standalone_mode=False)
        if ending.wait(_RETRY_SECONDS):
            time.sleep(_POLL_SECONDS)  # as a wait for an event that is set is none


def _is_uploaded(folder: Path) -> bool:
    """Whether wandb has marked an offline run as uploaded to its end."""
    return any(folder.glob("*.wandb.synced"))


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)  # at once: wandb's own hooks would wait for the network
