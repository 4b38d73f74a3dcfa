"""Keeps a run going: starts groups of workers one after the other until the run is done.

After faults that ended a group the next one starts from the newest checkpoint, with as many workers
as there is room for within `launch.num_workers`; when there is room for more, the group is asked to
checkpoint and a larger one goes on. Faults count against `launch.max_failures` until a newer
checkpoint shows that there was progress. It knows nothing of Ray: a `Workers` object starts groups.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ganscale.config import Config
from ganscale.errors import GanscaleError
from ganscale.training.stopping import StopRequest, TrainResult

_logger = logging.getLogger(__name__)

_ROOM_SECONDS = 2.0
"""Between two looks at the cluster while a group trains."""
_WAIT_SECONDS = 0.3
"""Between two looks while none does."""


class Failure(Exception):
    """A group of workers ended by faults that another group may survive.

    `faults` is how many there were, restarts within the group included; 0 if nobody is to blame.
    """

    def __init__(self, message: str, *, faults: int = 1) -> None:
        super().__init__(message)
        self.faults = faults


class Workers(Protocol):
    """Starts groups of workers."""

    def room(self) -> int:
        """How many more workers fit now; called by one thread while another is in `run`."""
        ...

    def explain_room(self) -> str:
        """What a worker takes and what there is of it, in a few words."""
        ...

    def run(self, num_workers: int, stop: StopRequest) -> TrainResult:
        """Train until the end, a stop, or a fault: raises `Failure`, or an error for good."""
        ...


class Supervisor:
    """Runs groups of workers.

    Args:
        config: of the run.
        newest_nimg: the position of the newest checkpoint, -1 without any.
        note: takes an event's name and fields, from any thread.
    """

    def __init__(
        self, config: Config, newest_nimg: Callable[[], int], note: Callable[..., Any]
    ) -> None:
        self.config = config
        self._newest_nimg = newest_nimg
        self.note = note

    def run(self, workers: Workers, stop: StopRequest) -> TrainResult:
        """To the end of the run, or to a stop that `stop` asks for.

        Raises `GanscaleError` after more than `launch.max_failures` faults without progress.
        """
        limit, failures, reached = self.config.launch.max_failures, 0, self._newest_nimg()
        has_trained = False
        while True:
            num_workers = self._wait_for_room(workers, stop)
            if not num_workers:
                position = self._newest_nimg() if has_trained else reached
                return TrainResult(max(0, position), stop.reason, has_trained)
            has_trained = True
            try:
                ending = self._run_group(workers, num_workers, stop)
            except Failure as failure:
                position = self._newest_nimg()
                progress, reached = position > reached, max(reached, position)
                failures = min(1, failure.faults) if progress else failures + failure.faults
                self.note("group_lost", message=str(failure), num_workers=num_workers)
                if 0 <= limit < failures:
                    raise GanscaleError(f"training failed: {failure}") from failure
                continue
            if ending.reason != "regroup":
                return ending

    def _run_group(self, workers: Workers, num_workers: int, stop: StopRequest) -> TrainResult:
        """One group, that is asked to make way when there is room for a larger one."""
        wanted = StopRequest()
        ended = threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(workers, num_workers, stop, wanted, ended), daemon=True
        )
        watcher.start()
        try:
            return workers.run(num_workers, wanted)
        finally:
            ended.set()
            watcher.join()

    def _watch(
        self,
        workers: Workers,
        num_workers: int,
        stop: StopRequest,
        wanted: StopRequest,
        ended: threading.Event,
    ) -> None:
        """Pass on a stop within a moment; ask for a regroup when room for more has lasted."""
        looked, found, room = time.monotonic(), 0, 0
        while not ended.wait(0.1):
            if stop.reason:
                wanted.reason = stop.reason
            elif num_workers < self.config.launch.max_workers:
                if time.monotonic() - looked > _ROOM_SECONDS:
                    looked = time.monotonic()
                    try:
                        room = workers.room()
                    except Exception:  # or a later stop would not reach the group any more
                        _logger.warning("the room for more workers is not known", exc_info=True)
                        room = 0
                    found = found + 1 if room > 0 else 0
                if found == 2 and not wanted.reason and not ended.is_set():
                    self.note("regroup", num_workers=num_workers, room=room)
                    wanted.reason = "regroup"

    def _wait_for_room(self, workers: Workers, stop: StopRequest) -> int:
        """How many workers to start; waits for the fewest allowed. 0 if the run is to stop."""
        launch = self.config.launch
        stop.is_training = is_reported = False
        while not stop.reason:
            room = workers.room()
            if room >= launch.min_workers:
                # From here on a group may train, and what it does is worth a checkpoint.
                stop.is_training = True
                return min(room, launch.max_workers)
            if not is_reported:
                is_reported = True
                message = workers.explain_room()
                self.note("waiting", room=room, min_workers=launch.min_workers, message=message)
            time.sleep(_WAIT_SECONDS)
        return 0
