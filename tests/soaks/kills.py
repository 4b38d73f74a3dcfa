"""Kill a run on Ray again and again; its weights must be those of a run that was left alone.

    python -m tests.soaks.kills --shards data/cifar10-train --kills 25 --seed 0
    python -m tests.soaks.kills --shards data/cifar10-train --kills 25 --seed 1 --store s3

Two workers train a small DCGAN under Ray. At a random moment of a random kind (while training,
while a checkpoint is being written, while a restart reads one) SIGKILL goes to either rank, both,
Ray's controller, or the driver, which is then started again. At the end the sha256 over all tensors
is compared with that of an uninterrupted run of two plain processes. `--store s3` keeps checkpoints
on an S3 server of its own (needs moto, from the development extras).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from tests.soaks.runs import add_arguments, newest, small_run, train_undisturbed, write_config
from tests.support.runs import read_rows

TARGETS = ("rank 0", "rank 1", "both ranks", "controller", "driver")
MOMENTS = ("training", "training", "checkpoint", "restore")


def main() -> None:
    """Parse, run, compare; exit code 1 if the weights differ."""
    arguments = _arguments()
    undisturbed = train_undisturbed(arguments)
    with _s3() if arguments.store == "s3" else nullcontext() as location:
        name = f"soak-{arguments.seed}"
        config = small_run(arguments, name, checkpoint__location=location)
        soak = Soak(config, random.Random(arguments.seed))
        soak.run(arguments.kills)
        found, expected = newest(config), newest(undisturbed)
    print(json.dumps(soak.summary(), indent=1))
    print(f"expected {expected}\nfound    {found}")
    if found != expected:
        sys.exit("the weights differ")
    print("the weights are bit-identical")


@dataclass
class Kill:
    """One kill and what it took to recover."""

    target: str
    moment: str
    unfinished: bool
    """Whether it left a half-written checkpoint."""
    seconds: float
    """From the kill to the first row of the next attempt."""


class Soak:
    """The run that is killed."""

    def __init__(self, config: Config, rng: random.Random) -> None:
        self.config = config
        self.rng = rng
        self.run_dir = RunDirectory(config.run_dir)
        self.store = CheckpointStore(config.checkpoints)
        self.kills: list[Kill] = []
        self._unfinished: list[Any] = []
        self._file = write_config(config)
        self._driver = self._start()

    def run(self, num_kills: int) -> None:
        """Kill `num_kills` times, then let the run come to its end."""
        while len(self.kills) < num_kills:
            target = self.rng.choice(TARGETS)
            # A driver that is killed while it starts has no workers yet to read a checkpoint.
            moment = self.rng.choice(MOMENTS)
            attempt = self._wait_for_moment(moment)
            workers = {process.pid for process in self._processes("RayTrainWorker")}
            began = time.time()
            self._kill(target)
            if target == "driver":
                self._driver.wait()
                self._driver = self._start()
            row = self._first_row(workers, began)
            unfinished = any(f.attempt <= attempt for f in self._unfinished)
            seconds = row["time/unix"] - began
            self.kills.append(Kill(target, moment, unfinished, seconds))
            print(
                f"{len(self.kills):3} {target:10} while {moment:10} at {row['nimg'] / 1000:7.2f} "
                f"kimg: training again after {seconds:5.1f} s",
                flush=True,
            )
        if self._driver.wait() != 0:
            sys.exit("the run did not come to its end")

    def summary(self) -> dict[str, Any]:
        """Figures over all kills."""
        by_target = {t: [k.seconds for k in self.kills if k.target == t] for t in TARGETS}
        return {
            "kills": len(self.kills),
            "by_moment": {m: sum(k.moment == m for k in self.kills) for m in set(MOMENTS)},
            "half_written_checkpoints": sum(k.unfinished for k in self.kills),
            "recovery_seconds": {
                target: {
                    "kills": len(seconds),
                    "median": round(statistics.median(seconds), 1),
                    "max": round(max(seconds), 1),
                }
                for target, seconds in by_target.items()
                if seconds
            },
        }

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "ganscale", "train", "--config", str(self._file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _wait_for_moment(self, moment: str) -> int:
        """Returns the attempt that is running then."""
        self._unfinished = []
        attempt = self._attempt_that_trains()
        if moment == "restore":  # that of a restart, which a kill of rank 1 brings about
            self._kill("rank 1")
            while len(self.store.attempts()) == attempt:
                time.sleep(0.002)
            time.sleep(self.rng.uniform(0, 0.2))
            return attempt
        time.sleep(self.rng.uniform(1, 5))
        while moment == "checkpoint" and not self.store.unfinished():
            time.sleep(0.001)
        return attempt

    def _attempt_that_trains(self) -> int:
        """Waits until the latest attempt has logged a row."""
        while True:
            if self._driver.poll() is not None:
                sys.exit("the run has ended before its kills: give it more --kimg")
            rows, latest = read_rows(self.run_dir.metrics), len(self.store.attempts())
            if latest and rows and rows[-1]["attempt"] == latest:
                return latest
            time.sleep(0.05)

    def _first_row(self, old_workers: set[int], began: float) -> dict[str, Any]:
        """The first row of workers that did not live yet when the kill began.

        Others may log for a moment after their driver or controller is gone.
        """
        while True:
            self._unfinished = self._unfinished or self.store.unfinished()
            attempts = {
                event["attempt"]
                for event in read_rows(self.run_dir.events)
                if event["event"] in ("start", "resume") and event["pid"] not in old_workers
            }
            for row in read_rows(self.run_dir.metrics)[-200:]:
                if row["attempt"] in attempts and row["time/unix"] > began:
                    return row
            if self._driver.poll() is not None:
                sys.exit("the driver has given up")
            time.sleep(0.05)

    def _kill(self, target: str) -> None:
        if target == "driver":
            self._driver.kill()
            return
        starts = [e for e in read_rows(self.run_dir.events) if e["event"] in ("start", "resume")]
        title = "TrainController" if target == "controller" else "RayTrainWorker"
        processes = self._processes(title)
        pids = [process.pid for process in processes]
        main_pid = starts[-1]["pid"]
        # A restart that has not read its checkpoint yet has not said which worker is rank 0.
        if main_pid not in pids:
            main_pid = min(pids, default=0)
        for process in processes:
            wanted = {"rank 0": process.pid == main_pid, "rank 1": process.pid != main_pid}
            if wanted.get(target, True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._driver.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found


class _s3:  # noqa: N801
    """An S3 server for the time of the block; gives the location for checkpoints."""

    def __enter__(self) -> str:
        import boto3
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            os.environ[name] = "testing"
        boto3.client("s3").create_bucket(Bucket="soak")
        return "s3://soak/checkpoints"

    def __exit__(self, *_: object) -> None:
        self._server.stop()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--kills", type=int, default=25, help="How many.")
    parser.add_argument("--seed", type=int, default=0, help="Decides kinds and moments.")
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    return parser.parse_args()


if __name__ == "__main__":
    main()
