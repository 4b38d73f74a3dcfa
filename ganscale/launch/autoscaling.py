"""What a run would take beyond what it has, told to Ray's autoscaler.

Ray Train tells the autoscaler of the group that it starts, no more: an elastic run would only grow
into places that are there already, and a run would wait for ever on a cluster without nodes yet.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    DefaultAutoscalingCoordinator,
)
from ray.exceptions import RayError

__all__ = ["Wish"]

_REFRESH_SECONDS = 20.0
_EXPIRE_SECONDS = 180.0
"""The cluster may shrink so long after a run's end by a kill."""


class Wish:
    """Places for workers that a run would like to have.

    Kept by Ray's coordinator, which adds up what all ask for: what one asks for by
    `ray.autoscaler.sdk.request_resources` it overwrites. Without an autoscaler nothing comes of it.

    Args:
        name: of the run.
        worker: what a worker takes, such as `{"CPU": 4.0, "GPU": 1.0}`.
    """

    def __init__(self, name: str, worker: dict[str, float]) -> None:
        self._worker = worker
        self._coordinator = DefaultAutoscalingCoordinator(f"{name}-{secrets.token_hex(4)}")
        self._asked = 0
        self._when = float("-inf")

    def ask(self, num_workers: int) -> None:
        """For so many, in place of what was asked for before; often, as a wish expires."""
        if num_workers == self._asked and time.monotonic() - self._when < _REFRESH_SECONDS:
            return
        with suppress(RayError):  # those who need the cluster hear that it is gone
            if num_workers:
                self._coordinator.request_resources([self._worker] * num_workers, _EXPIRE_SECONDS)
            elif self._asked:
                self._coordinator.cancel_request()
        self._asked, self._when = num_workers, time.monotonic()
