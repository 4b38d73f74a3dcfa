"""Cut a host off from a run on Ray; the run goes on, and nobody writes what is not theirs.

    sudo -E python -m tests.soaks.partition --shards data/cifar10-train --workers elastic --cut 30
    ...                                     --workers elastic --cut forever
    ...                                     --workers fixed --cut 30
    ...                                     --workers fixed --cut 75 --spare --frozen

Hosts in network namespaces on one switch: `head` has Ray's head and the driver, `left` and `right`
a CPU and a worker each; `--spare` adds one that takes the place of a lost one. Storage is a folder
that all of them reach at any time, so a worker that was cut off can still write: the case that
attempts have to fence. `--frozen` stops rank 0 while it writes a checkpoint, cuts, and lets it go
on when its successor has written some; otherwise it waits for its peers until Ray ends it.

Checked: the run trains again in time and ends; it goes on from the newest checkpoint; no claim or
checkpoint is changed, and none of the newest is missing, at any time; all verify; with a fixed
number of workers the sha256 over all tensors is that of an uninterrupted run. Needs Linux and root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ganscale.checkpoint import CheckpointStore
from ganscale.checkpoint.lineage import CheckpointName, lineage
from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from ganscale.storage import MissingData
from tests.soaks.runs import add_arguments, newest, small_run, train_undisturbed, write_config
from tests.support.hosts import RAY_ADDRESS, Network
from tests.support.runs import read_rows

CHECKPOINTS_BEFORE, CHECKPOINTS_AFTER = 4, 3
"""Whole checkpoints before the cut, and of the successor before a frozen worker goes on."""


class Broken(Exception):
    """A guarantee does not hold."""


def main() -> None:
    """Parse, run, check; exit code 1 if a guarantee failed."""
    arguments = _arguments()
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: sudo -E python -m tests.soaks.partition ...")
    signal.signal(signal.SIGTERM, _exit)
    config = _config(arguments)
    hosts = config.run_dir.parent / f"{config.name}-hosts"
    for folder in (config.run_dir, hosts):
        if folder.exists():
            sys.exit(f"{folder} exists: remove it, or choose another --storage")
    fixed = arguments.workers == "fixed"
    expected = newest(train_undisturbed(arguments)) if fixed else None
    with Network(hosts, spare=arguments.spare) as network:
        partition = Partition(config, network, arguments)
        try:
            partition.run()
            partition.check(expected)
        except Broken as broken:
            partition.problems.append(str(broken))
    print(json.dumps(partition.summary(), indent=1))
    if partition.problems:
        sys.exit("broken: " + "; ".join(partition.problems))
    _say("all guarantees hold")


class Witness:
    """Looks at the checkpoints again and again, and notes what must not happen to them."""

    def __init__(self, config: Config) -> None:
        self.store = CheckpointStore(config.checkpoints)
        self.problems: list[str] = []
        self.late: list[str] = []
        """Checkpoints that became whole after a newer attempt than theirs had begun."""
        self._keep_last = config.checkpoint.keep_last
        self._seals: dict[str, str] = {}

    def look(self) -> None:
        """Claims and checkpoints never change, and the newest of the run are always there."""
        for file in self.store.backend.files():
            folder, _, last = file.rpartition("/")
            is_claim = folder == "attempts" and last.startswith("a")
            if is_claim or (CheckpointName.parse(folder) and last == "manifest.json"):
                self._look_at(file)
        # A listing is not of one moment: what is missing must be missing in the next one too.
        for name in self._missing() & self._missing():
            self._note(f"{name} is gone, though among the newest {self._keep_last}")

    def written_by(self, attempt: int) -> int:
        """How many checkpoints of an attempt were seen."""
        return sum(name.attempt == attempt for name in self._seen())

    def _look_at(self, file: str) -> None:
        try:
            data = b"".join(self.store.backend.chunks(file))
            json.loads(data)
        except (MissingData, ValueError):  # pruned, or being written
            return
        seal = hashlib.sha256(data).hexdigest()
        if file not in self._seals and self._is_late(file):
            self.late.append(file)
        if self._seals.setdefault(file, seal) != seal:
            self._note(f"{file} was overwritten")

    def _is_late(self, file: str) -> bool:
        name, root = CheckpointName.parse(file.partition("/")[0]), Path(self.store.location)
        if name is None:
            return False
        with suppress(FileNotFoundError):
            successor = (root / f"attempts/a{name.attempt + 1:04d}.json").stat()
            return (root / file).stat().st_mtime > successor.st_mtime
        return False

    def _seen(self) -> set[CheckpointName]:
        names = (CheckpointName.parse(file.partition("/")[0]) for file in self._seals)
        return {name for name in names if name is not None}

    def _missing(self) -> set[CheckpointName]:
        names = self.store.names()
        line = lineage(self._seen().union(names), self.store.attempts())
        return set(line[: self._keep_last]) - set(names)

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


class Partition:
    """The run whose host is cut off."""

    def __init__(self, config: Config, network: Network, arguments: argparse.Namespace) -> None:
        self.config = config
        self.network = network
        self.arguments = arguments
        self.run_dir = RunDirectory(config.run_dir)
        self.witness = Witness(config)
        self.problems: list[str] = self.witness.problems
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._zombies: list[psutil.Process] = []
        self._frozen: psutil.Process | None = None
        self._cut_at = self._up_at = self._thawed_at = float("inf")
        train = [sys.executable, "-m", "ganscale", "train", "--config", str(write_config(config))]
        self._driver = network.head.start(train, "driver.log")

    def run(self) -> None:
        """Cut, wait until it trains again, put the cable back, wait for the end."""
        both, cut = "to train with 2 workers", self.arguments.cut
        before = self._wait(lambda: self._trains(workers=2), both)["attempt"]
        self._wait(lambda: self.witness.written_by(before) >= CHECKPOINTS_BEFORE, "to save")
        self._choose_host()
        whole = self._cut()
        waits = self.arguments.workers == "fixed" and not self.arguments.spare
        limit = self.arguments.patience + (cut if waits else 0)
        row = self._wait(lambda: self._goes_on(before), "to train after the cut", limit)
        self._measure("cut_to_training", self._cut_at, row["time/unix"])
        self._check_start(before, whole)
        if cut != float("inf"):
            self._wait(lambda: self._up_at < float("inf"), "to have its link back", cut + 5)
            row = self._wait(lambda: self._trains(workers=2, since=self._up_at), both)
            self._measure("link_up_to_two_workers", self._up_at, row["time/unix"])
        self._follow_to_the_end()

    def check(self, expected: tuple[int, str] | None) -> None:
        """What must hold at the end; notes what does not."""
        if self._driver.returncode != 0:
            self.problems.append(f"the driver ended with {self._driver.returncode}")
        store, latest = self.witness.store, self.witness.store.attempts()[-1].number
        for name in store.names():
            if (problem := store.verify(name)) is not None:
                self.problems.append(f"{name}: {problem}")
        if (futile := self._num_futile_regroups()) > 0:
            self.problems.append(f"{futile} regroups did not make the group larger")
        found = newest(self.config)
        self.facts["tensors_sha256"] = found[1]
        if found[0] != self.config.total_nimg or store.lineage()[0].attempt != latest:
            self.problems.append(f"the newest checkpoint is {store.lineage()[0]}")
        if expected is not None:
            self.facts["expected_sha256"] = expected[1]
            if found != expected:
                self.problems.append("the weights are not those of an uninterrupted run")

    def summary(self) -> dict[str, Any]:
        """Figures, and what was seen of workers that had been superseded."""
        events, rows = read_rows(self.run_dir.events), read_rows(self.run_dir.metrics)
        begins = {e["attempt"]: e["time"] for e in events if "world_size" in e}
        counted = ("fault", "group_lost", "waiting", "regroup", "stall", "checkpoint_failed")

        def is_late(entry: dict[str, Any], at: str) -> bool:
            successor = entry.get("attempt", -1) + 1  # the driver's and Ray's events have none
            return bool(entry[at] > begins.get(successor, float("inf")))

        return {
            "workers": self.arguments.workers,
            "cut": str(self.arguments.cut),
            **self.facts,
            "seconds": self.seconds,
            "world_sizes": [e["world_size"] for e in events if "world_size" in e],
            "events": {kind: sum(e["event"] == kind for e in events) for kind in counted},
            "late": {
                "rows": sum(is_late(row, "time/unix") for row in rows),
                "events": [e for e in events if is_late(e, "time")],
                "checkpoints": self.witness.late,
            },
            "problems": self.problems,
        }

    def _choose_host(self) -> None:
        """Cut off the host of the rank that is asked for."""
        workers = {h.name: h.processes("RayTrainWorker") for h in self.network.nodes}
        main = next(h for h in self.network.nodes if any(map(self._is_main, workers[h.name])))
        other = next(h for h in self.network.nodes if workers[h.name] and h is not main)
        self._host = other if self.arguments.rank else main
        self._zombies = workers[self._host.name]
        hosts = (self.network.head, *self.network.nodes)
        self.facts |= {
            "cut_off": f"{self._host.name}, with rank {self.arguments.rank}",
            "controller_on": next((h.name for h in hosts if h.processes("TrainController")), "?"),
        }

    def _is_main(self, process: psutil.Process) -> bool:
        """Only rank 0 has the file of metrics open; the numbers of its processes are its own."""
        paths = [Path(file.path) for file in process.open_files()]
        return self.run_dir.metrics in paths

    def _cut(self) -> list[CheckpointName]:
        """Returns the checkpoints that were whole then."""
        if self.arguments.frozen:
            self._freeze()
        self.network.set_link(self._host, "down")
        self._cut_at = time.time()
        whole = self.witness.store.lineage()
        _say(f"{self.facts['cut_off']}, is cut off at {whole[0].nimg / 1000:g} kimg")
        return whole

    def _freeze(self) -> None:
        """Stop rank 0 in the middle of a checkpoint."""
        worker = next(filter(self._is_main, self._zombies))
        while True:
            while not self.witness.store.unfinished():
                self._check_driver("to save")
                time.sleep(0.001)
            worker.suspend()
            time.sleep(0.1)
            if unfinished := self.witness.store.unfinished():
                self._frozen = worker
                self.facts["frozen_while_writing"] = unfinished[0].path
                return
            worker.resume()
            time.sleep(0.5)

    def _wait(self, what: Callable[[], Any], aim: str, limit: float | None = None) -> Any:
        """What `what` returns as soon as that is true; meanwhile watch, and do what is due."""
        limit = self.arguments.patience if limit is None else limit
        deadline = time.monotonic() + limit
        while True:
            self._do_what_is_due()
            if found := what():
                return found
            self._check_driver(aim)
            if time.monotonic() > deadline:
                raise Broken(f"not seen {aim} within {limit:g} s")
            time.sleep(0.2)

    def _check_driver(self, aim: str) -> None:
        code = self._driver.poll()
        if code == 0:
            raise Broken(f"the run came to its end before it was seen {aim}: give it more --kimg")
        if code is not None:
            raise Broken(f"the driver ended with {code} before it was seen {aim}")

    def _do_what_is_due(self) -> None:
        self.witness.look()
        now = time.time()
        if now - self._cut_at > self.arguments.cut and self._up_at == float("inf"):
            self.network.set_link(self._host, "up")
            self._up_at = now
            _say("the link is back")
        if self._frozen is not None and self._thawed_at == float("inf"):
            latest = len(self.witness.store.attempts())
            enough = self.witness.written_by(latest) >= CHECKPOINTS_AFTER
            if enough and self._trains(since=self._cut_at):
                self._thaw(latest)
        if self._num_futile_regroups() > 2:
            raise Broken("the group makes way for a larger one again and again")
        if self._zombies and now > self._cut_at:
            self._zombies = [z for z in self._zombies if z.is_running() and not _is_dead(z)]
            if not self._zombies:
                self._frozen = None
                self._measure("cut_to_end_of_its_worker", self._cut_at, now)

    def _thaw(self, latest: int) -> None:
        """Let rank 0 go on, if it is still there: Ray ends it when it hears of its node's death."""
        assert self._frozen is not None
        self._thawed_at = time.time()
        with suppress(psutil.NoSuchProcess):
            self._frozen.resume()
            self._measure("cut_to_thaw", self._cut_at, self._thawed_at)
            self.facts["thawed"] = f"rank 0 of attempt 1, while attempt {latest} trains"

    def _trains(self, workers: int = 0, since: float = 0.0) -> dict[str, Any] | None:
        """The last row, if it is of the latest attempt, of that many workers, and new."""
        sizes = {e["attempt"]: e["world_size"] for e in self._begins()}
        rows = read_rows(self.run_dir.metrics)[-1:]
        for row in rows:
            is_latest = row["attempt"] == max(sizes, default=0)
            if is_latest and sizes[row["attempt"]] >= workers and row["time/unix"] > since:
                return row
        return None

    def _goes_on(self, before: int) -> dict[str, Any] | None:
        """The last row, if it is of a newer attempt, or the same goes on with the link back."""
        row = self._trains(since=self._cut_at)
        is_after = row is not None and (row["attempt"] > before or row["time/unix"] > self._up_at)
        return row if is_after else None

    def _begins(self) -> list[dict[str, Any]]:
        return [e for e in read_rows(self.run_dir.events) if "world_size" in e]

    def _num_futile_regroups(self) -> int:
        """How often the group had to make way without need; one may be under way."""
        sizes: list[int] = [e["world_size"] for e in self._begins()]
        regroups = [e for e in read_rows(self.run_dir.events) if e["event"] == "regroup"]
        return len(regroups) - sum(b > a for a, b in pairwise(sizes))

    def _check_start(self, before: int, whole: list[CheckpointName]) -> None:
        """No more is lost than what came after the last checkpoint."""
        attempts = [a for a in self.witness.store.attempts() if a.number > before]
        if attempts and (attempts[0].start is None or attempts[0].start < whole[0]):
            self.problems.append(f"{whole[0]} was there, but it went on from {attempts[0].start}")
        last = [r["nimg"] for r in read_rows(self.run_dir.metrics) if r["attempt"] == before][-1]
        start = attempts[0].start if attempts else None
        self.facts["images_trained_again"] = last - start.nimg if start else 0

    def _follow_to_the_end(self) -> None:
        """As long as rows come, and then until the driver ends."""
        while self._driver.poll() is None:
            rows = read_rows(self.run_dir.metrics)
            silence = time.time() - rows[-1]["time/unix"]
            if silence > self.arguments.patience:
                raise Broken(f"no row for {silence:.0f} s")
            self._do_what_is_due()
            time.sleep(0.2)
        times = sorted(row["time/unix"] for row in read_rows(self.run_dir.metrics))
        self.seconds["longest_silence"] = round(max(b - a for a, b in pairwise(times)), 1)
        self._measure("last_row_to_end_of_driver", times[-1], time.time())

    def _measure(self, name: str, began: float, ended: float) -> None:
        self.seconds[name] = round(ended - began, 1)
        _say(f"{name.replace('_', ' ')}: {ended - began:.1f} s")


def _config(arguments: argparse.Namespace) -> Config:
    cut = "forever" if arguments.cut == float("inf") else f"{arguments.cut:g}"
    name = f"partition-{arguments.workers}-{cut}-rank{arguments.rank}"
    return small_run(
        arguments,
        name + "-spare" * arguments.spare + "-frozen" * arguments.frozen,
        launch__num_workers=[1, 2] if arguments.workers == "elastic" else 2,
        launch__ray_address=RAY_ADDRESS,
        launch__timeout_seconds=30,
        launch__stall_seconds=20,
    )


def _is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--workers", choices=("elastic", "fixed"), default="elastic")
    parser.add_argument("--cut", default="30", help="Seconds, or forever.")
    parser.add_argument("--rank", type=int, choices=(0, 1), default=0, help="Whose host is cut.")
    parser.add_argument("--frozen", action="store_true", help="Stop rank 0 while it saves.")
    parser.add_argument("--spare", action="store_true", help="A third host with a CPU.")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="Seconds without progress that are a hang."
    )
    arguments = parser.parse_args()
    try:
        arguments.cut = float("inf" if arguments.cut == "forever" else arguments.cut)
    except ValueError:
        parser.error(f"--cut takes seconds or forever, not {arguments.cut}")
    if arguments.cut == float("inf") and arguments.workers == "fixed" and not arguments.spare:
        parser.error("--cut forever with --workers fixed can only go on with --spare")
    if arguments.frozen and arguments.rank != 0:
        parser.error("--frozen stops rank 0: give it --rank 0")
    return arguments


if __name__ == "__main__":
    main()
