"""How many more workers a Ray cluster has room for, which its autoscaler hears of as well.

Room is found out by asking for it: placement groups wait for the resources of a worker and are
given back as soon as they have them. While they wait, Ray's autoscaler counts them as demand, so a
cluster that can grow does.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

_ANSWER_SECONDS = 1.0
"""Ray places a group within some tens of milliseconds where there is room for it."""
_POLL_SECONDS = 0.02


class Places:
    """Places for workers that a run would like to have. Threads may ask at the same time.

    Args:
        worker: what one of them takes, such as `{"CPU": 4.0, "GPU": 1.0}`.
    """

    def __init__(self, worker: dict[str, float]) -> None:
        self._worker = worker
        self._first: PlacementGroup | None = None
        """The fewest workers that are of use."""
        self._rest: PlacementGroup | None = None
        """All others, so that an autoscaler starts nodes for them at the same time."""
        self._asked = (0, 0)
        self._lock = threading.RLock()

    def num_free(self, num_workers: int, *, at_least: int = 1) -> int:
        """How many of `num_workers` have room now; 0 while fewer than `at_least` have.

        The first `at_least` wait together: two runs that each held a part of what both need would
        wait for each other for ever. Raises `RayError` if the cluster's head does not answer.
        """
        with self._lock:
            if self._asked != (num_workers, at_least):
                self.give_back()
                self._asked = (num_workers, at_least)
            return self._num_free(num_workers, at_least) if num_workers else 0

    def _num_free(self, num_workers: int, at_least: int) -> int:
        num_others = num_workers - at_least
        self._first = _unless_lost(self._first) or self._ask(at_least)
        if num_others:
            self._rest = _unless_lost(self._rest) or self._ask(num_others)
        if not _has_room([self._first]):
            # Others must not take what the first wait for; they are asked for again next time.
            if self._rest is not None and _has_room([self._rest], seconds=0.0):
                _give_back(self._rest)
                self._rest = None
            return 0
        found = at_least
        if self._rest is not None:
            found += num_others if _has_room([self._rest]) else self._num_single(num_others)
        self.give_back()
        return found

    def give_back(self) -> None:
        """Ask for nothing any more."""
        with self._lock:
            for group in (self._first, self._rest):
                if group is not None:
                    _give_back(group)
            self._first, self._rest, self._asked = None, None, (0, 0)

    def _num_single(self, num_workers: int) -> int:
        """How many of some workers, for all of which there is no room, have room."""
        assert self._rest is not None
        _give_back(self._rest)
        self._rest = None
        groups = [self._ask(1) for _ in range(num_workers)]
        try:
            return _has_room(groups)
        finally:
            for group in groups:
                _give_back(group)

    def _ask(self, num_workers: int) -> PlacementGroup:
        return placement_group([self._worker] * num_workers, strategy="PACK")


def _give_back(group: PlacementGroup) -> None:
    with suppress(RayError):  # a head that is gone holds no places
        remove_placement_group(group)


def _unless_lost(group: PlacementGroup | None) -> PlacementGroup | None:
    """A group that may still get its resources; None if the cluster's head does not know it, as
    after a restart that has forgotten what was asked for."""
    if group is None or _state(group) not in ("", "REMOVED"):
        return group
    _give_back(group)  # a head that had only been slow to answer must not keep it
    return None


def _state(group: PlacementGroup) -> str:
    """What the cluster's head says of a group; empty if it does not know it."""
    return str(placement_group_table(group).get("state", ""))


def _has_room(groups: list[PlacementGroup], seconds: float = _ANSWER_SECONDS) -> int:
    """How many of the groups have their resources, within the time that Ray takes to tell."""
    deadline = time.monotonic() + seconds
    while True:
        states = [_state(group) for group in groups]
        num = states.count("CREATED")
        if num == len(groups) or time.monotonic() >= deadline:
            return num
        time.sleep(_POLL_SECONDS)
