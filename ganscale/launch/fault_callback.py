"""Faults of workers, told by Ray's controller, which imports this and so waits for its imports."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError
from ray.train import UserCallback

from ganscale.launch.driver_actor import Messages


class FaultCallback(UserCallback):  # type: ignore[misc]
    """Tells the driver of faults, from Ray's controller, which outlives the workers and may be on
    any host: what happened, and that the group has lost its places until it has started again.
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._faults: list[str] = []

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._faults.append(first_cause(worker_exceptions))
        with suppress(RayError):  # an error here would end the run
            self._messages.put("faults", self._faults)
            self._messages.put("places", None)


def first_cause(failures: Mapping[int, Exception]) -> str:
    """What happened, in one line. Who lost touch with a worker says less than who was lost."""
    # Ray's exceptions for errors of a worker are texts with the traceback, of which the last line
    # is the error itself.
    causes = [(rank, str(e).strip().splitlines()[-1], e) for rank, e in sorted(failures.items())]
    own = [cause for cause in causes if "Connection" not in cause[1]]
    rank, text, error = (own or causes)[0]
    if type(error).__name__ == "WorkerHealthCheckFailedError":
        return f"rank {rank} is gone"
    return f"rank {rank}: {' '.join(text.split())[:300]}"
