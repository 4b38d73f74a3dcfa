"""The process that logs a run to W&B, so that nothing W&B does can hold or harm training.

    python -m ganscale.tracking.wandb_process SETTINGS < pipe

It follows the files of the run's folder and logs them to an offline run, for which wandb asks no
server. If the mode is online, a thread uploads that run while it grows, with `wandb beta sync
--live`. How far the files were logged is kept in a file: a process that is killed loses nothing,
its successor logs the last second once more.

SETTINGS is the JSON object that `WandbSink` makes. Anything on standard input says that the run has
ended; an end without it, that the training process was killed. Messages for the user go to standard
output, one a line.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
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
from ganscale.tracking.wandb_settings import artifacts_to_log, seconds
from ganscale.tracking.wandb_sink import POSITIONS

__all__ = ["RunLog", "main"]

_POLL_SECONDS = 1.0
_FLUSH_SECONDS = 0.05
"""wandb's own default of 15 s delays the curves, and loses as much to a kill."""
_RETRY_SECONDS = 60.0
"""Between two uploads, where the first one ended too early."""
_ALERTS = ("alarm", "checkpoint_failed", "evaluation_failed", "rollback", "stall")


def main() -> None:
    """Serve one run, to its close or the other side's end."""
    # Schedulers such as Slurm send these to all processes of a job. This one still has rows to log
    # then, and ends when the training process does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say = partial(_say, os.dup(1))
    os.dup2(2, 1)  # for what wandb prints
    settings = json.loads(sys.argv[1])
    # That of an attempt which was killed may still be logging its last rows, and both would log
    # them. Held until this process ends.
    FileLock(Path(settings["root"], "wandb", ".lock")).acquire()
    run = _offline_run(settings)
    folder = Path(run.settings.sync_dir)
    core = next(child for child in psutil.Process().children() if child.name() == "wandb-core")
    log = RunLog(Path(settings["root"]), run, say)
    ending = threading.Event()
    upload = threading.Thread(target=_upload, args=(folder, ending), daemon=True)
    if settings["mode"] == "online":
        upload.start()
        threading.Timer(seconds("WANDB_INIT_TIMEOUT"), _check_upload, (folder, say)).start()
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
        upload.join(seconds("WANDB_FINISH_TIMEOUT"))
        if not _is_uploaded(folder):
            say(f"W&B did not take all of the run in time: {_sync_later(folder)}")
    if upload.is_alive():
        time.sleep(_POLL_SECONDS)  # for the end of the file, as above
        core.kill()
    else:
        wandb.teardown()  # which writes the end of the file
    log.keep_positions()


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
    # Not wandb's counter of rows, which cannot go back as a run does that resumes at an earlier
    # position.
    run.define_metric("nimg")
    run.define_metric("*", step_metric="nimg")
    return run


class RunLog:
    """Logs the files of the folder `root` to a W&B run; `say` takes messages for the user."""

    def __init__(self, root: Path, run: Any, say: Callable[[str], None]) -> None:
        self._root = root
        self._run = run
        self._say = say
        self._positions = self._kept = json.loads((root / POSITIONS).read_text())
        self._artifacts = artifacts_to_log()
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
            except Exception as error:  # a picture has been deleted; wandb raises what it likes
                self._say(f"W&B: something was not logged ({type(error).__name__}: {error})")
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
        if "event" in line:
            self._log_event(line)
        elif "picture" in line:
            picture = wandb.Image(line["path"], caption=f"{line['nimg'] / 1000:g} kimg")
            self._run.log({line["picture"]: picture, "nimg": line["nimg"]})
        elif "average" in line:
            self._log_snapshot(line["average"], line["path"], line["nimg"])
        else:
            self._nimg = line["nimg"]
            counts = {f"faults/{kind}": self._faults[kind] for kind in FAULTS}
            self._run.log({**{k: v for k, v in line.items() if v is not None}, **counts})

    def _log_event(self, event: Row) -> None:
        """Draw a fault over the curves, where its count steps up; send alerts of severe ones."""
        if not self._faults.add(event):
            return
        kind = event["event"]
        nimg = event.get("nimg", self._nimg)
        self._run.log({f"faults/{kind}": self._faults[kind], "nimg": nimg})
        if kind in _ALERTS:
            text = str(event.get("message") or json.dumps(event))
            self._run.alert(f"{self._root.name}: {kind}", text, level="WARN")

    def _log_snapshot(self, average: str, path: str, nimg: int) -> None:
        """Make the snapshot a version of the run's model, if the user asked for that."""
        is_best = average == "best"
        if self._artifacts == "none" or (self._artifacts == "best" and not is_best):
            return
        name = self._root.name + ("" if is_best or not average else f"-{average}")
        metadata = {"nimg": nimg, "average": average, "run": self._root.name}
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), "model", metadata=metadata)
        artifact.add_file(path, skip_cache=True)
        aliases = ["best" if is_best else "latest", f"kimg-{nimg / 1000:g}"]
        self._run.log_artifact(artifact, aliases=aliases)


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
        ending.wait(_RETRY_SECONDS)


def _check_upload(folder: Path, say: Callable[[str], None]) -> None:
    # wandb writes this file when the server has answered.
    if not any(folder.glob("*.wandb.syncstate")):
        limit = seconds("WANDB_INIT_TIMEOUT")
        say(f"W&B has not answered within {limit:g} s, and is asked on: {_sync_later(folder)}")


def _is_uploaded(folder: Path) -> bool:
    """Whether wandb has marked an offline run as uploaded to its end."""
    return any(folder.glob("*.wandb.synced"))


def _sync_later(folder: Path) -> str:
    return f"what it lacks can be uploaded later: wandb sync {folder.parent}/offline-run-*"


def _say(answers: int, message: str) -> None:
    """Tell the user, if anybody still listens."""
    with suppress(OSError):
        os.write(answers, f"{' '.join(message.split())}\n".encode())


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # at once: wandb's own hooks would wait for the network
