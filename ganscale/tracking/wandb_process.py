"""The process that holds a run's W&B run, so that nothing W&B does can hold or harm training.

    python -m ganscale.tracking.wandb_process < messages

Reads a JSON object a line from standard input: first the settings of the run, then what to log,
last {"do": "close"}. Answers on standard output, a JSON object a line: which mode the run is in,
and what could not be done. It ends when the training process is gone. If W&B cannot be reached in
time, it continues offline. If W&B cannot be used at all, it reports why and ends.

A process and not a thread: after a failed `wandb.init` wandb's service holds the run's id, its exit
hooks wait for the network once more, and neither can be ended from within.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import psutil

from ganscale.json_lines import encode_line

__all__ = ["main"]

_FLUSH_SECONDS = 0.05
"""wandb's own default of 15 s loses as much to a kill."""
_UPLOAD_FAILED = "Fatal error while uploading"
"""What wandb says, and says only on the terminal, where it has given up an upload."""
_AGAIN_VARIABLE = "GANSCALE_WANDB_AGAIN"
_SLOW = ("table", "artifact", "alert")
"""What asks the server something and may wait for it, so that rows and pictures do not queue behind
it: these run on a thread of their own."""


def main() -> None:
    """Serve one run, to its close or the other side's end."""
    # Schedulers such as Slurm send these to all processes of a job. This one still has rows to log
    # then, and ends when the training process does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Answers have standard output to themselves, whatever wandb prints.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    begun = os.environ.pop(_AGAIN_VARIABLE, "") or _first_line()
    if not begun:
        return
    try:
        holder = _Holder(json.loads(begun), answers)
    except Exception as error:  # wandb refuses a setting; the disk is full
        failure = f"it could not begin an offline run: {_brief(error)}"
        _answer(answers, failure=failure, hopeless=True)
        raise
    for line in iter(sys.stdin.buffer.readline, b""):
        message = json.loads(line)
        if message["do"] == "close":
            holder.finish()
            return
        holder.do(message)
    holder.abandon()


def _first_line() -> str:
    """The first line and not a byte more: whoever takes this process's place reads the others."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


class _Holder:
    """The W&B run.

    Args:
        settings: `init` for `wandb.init`, the seconds it may take, `mode`, and the training
            process's `pid`, which system figures are of.
        answers: where answers go.
    """

    def __init__(self, settings: dict[str, Any], answers: TextIO) -> None:
        import wandb

        self._answers = answers
        self._wandb = wandb
        self._settings = settings
        self._log_size = os.fstat(2).st_size
        self.mode = settings["mode"]
        if self.mode == "online":
            try:
                self._run = self._init("online")
            except Exception as error:  # wandb raises what it likes
                self._go_offline(error)
        else:
            self._run = self._init("offline")
        self._slow: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._slow_thread = threading.Thread(target=self._do_slow, daemon=True)
        self._slow_thread.start()
        self._report(mode=self.mode)

    def do(self, message: dict[str, Any]) -> None:
        """Log something; what cannot be logged is reported."""
        if message["do"] in _SLOW:
            self._slow.put(message)
        else:
            self._do(message)

    def finish(self) -> None:
        """Wait for what is being uploaded, as long as the settings allow, and end."""
        self._slow.put(None)
        self._slow_thread.join(self._settings["seconds"]["finish"])
        try:
            self._run.finish()
        except TimeoutError:
            self._report(problem=self._not_uploaded("in time"))
        except Exception as error:
            self._report(problem=self._not_uploaded(f"({_brief(error)})"))
        else:
            if self.mode == "online" and self._gave_up():
                self._report(problem=self._not_uploaded("(it failed)"))
        if self.mode == "offline":  # nothing to ask the network; the file's end is still written
            with suppress(Exception):
                self._wandb.teardown()
        self._report(closed=True)
        _kill_service()
        os._exit(0)  # wandb's own hooks would wait once more

    def abandon(self) -> None:
        """End after the training process has ended without closing: killed, perhaps to come back.

        An offline file is completed. W&B finds out by itself that an online run has crashed, and
        must not hear it from here when its successor has begun.
        """
        if self.mode == "offline":
            with suppress(Exception):
                self._run.finish(exit_code=1)
                self._wandb.teardown()
        os._exit(1)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        seconds = self._settings["seconds"]
        run = self._wandb.init(
            **self._settings["init"],
            mode=mode,
            resume="allow",
            settings=self._wandb.Settings(
                init_timeout=seconds["init"],
                finish_timeout=seconds["finish"] if mode == "online" else 0,  # 0 is no limit
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=_FLUSH_SECONDS,
                x_stats_pid=self._settings["pid"],
                x_label="rank-0",
                silent=True,
                console="off",
            ),
        )
        # Rows have our own step as the horizontal axis: wandb's counter cannot go back, as a run
        # does that resumes at an earlier position.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _go_offline(self, error: Exception) -> None:
        """Become a new process that logs offline: wandb, once it has failed, holds the run's id."""
        seconds = self._settings["seconds"]["init"]
        self._report(
            message=f"W&B could not be reached within {seconds:g} s ({_brief(error)}); the run is "
            f"logged offline and can be uploaded later: {self._sync_command('offline-run')}",
        )
        _kill_service()
        # By the environment and not by a pipe: standard input goes on to the new process, and the
        # messages that were not read yet are still in it.
        os.environ[_AGAIN_VARIABLE] = json.dumps({**self._settings, "mode": "offline"})
        os.environ.pop("WANDB_SERVICE", None)
        os.dup2(self._answers.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name])

    def _do_slow(self) -> None:
        while (message := self._slow.get()) is not None:
            self._do(message)

    def _do(self, message: dict[str, Any]) -> None:
        try:
            getattr(self, f"_do_{message['do']}")(message)
        except ConnectionError as error:  # to wandb's own process, not to the server
            self._report(failure=f"wandb-core is gone: {_brief(error)}")
            os._exit(1)
        except Exception as error:
            self._report(problem=f"W&B: {message['do']} was not logged ({_brief(error)})")

    def _do_log(self, message: dict[str, Any]) -> None:
        self._run.log(message["row"], commit=True)

    def _do_picture(self, message: dict[str, Any]) -> None:
        nimg = message["row"]["nimg"]
        picture = self._wandb.Image(message["path"], caption=f"{nimg / 1000:g} kimg")
        self._run.log({message["name"]: picture, **message["row"]}, commit=True)

    def _do_table(self, message: dict[str, Any]) -> None:
        table = self._wandb.Table(columns=message["columns"], data=message["data"])
        self._run.log({message["name"]: table, **message["row"]}, commit=True)

    def _do_artifact(self, message: dict[str, Any]) -> None:
        artifact = self._wandb.Artifact(
            re.sub(r"[^\w.-]", "-", message["name"]), type="model", metadata=message["metadata"]
        )
        artifact.add_file(message["path"], skip_cache=True)
        self._run.log_artifact(artifact, aliases=message["aliases"])

    def _do_alert(self, message: dict[str, Any]) -> None:
        self._run.alert(message["title"], message["text"], level="WARN")

    def _not_uploaded(self, why: str) -> str:
        return (
            f"W&B did not take all of the run {why}; it is whole in metrics.jsonl, and here: "
            f"{self._sync_command('run')}"
        )

    def _sync_command(self, kind: str) -> str:
        return f"wandb sync {self._settings['init']['dir']}/wandb/{kind}-*"

    def _gave_up(self) -> bool:
        """Whether wandb has said so since it was started; our error output is a file."""
        with suppress(OSError), Path("/proc/self/fd/2").open("rb") as file:
            file.seek(self._log_size)
            return _UPLOAD_FAILED.encode() in file.read()
        return False

    def _report(self, **what: Any) -> None:
        _answer(self._answers, **what)


def _answer(answers: TextIO, **what: Any) -> None:
    with suppress(OSError):  # nobody hears it any more; what was sent before is still logged
        answers.write(encode_line(what).decode())


def _kill_service() -> None:
    """End wandb's own process at once; asked to end, it would go on asking the network."""
    for process in psutil.Process().children():
        process.kill()
        process.wait(10)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
