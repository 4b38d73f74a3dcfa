"""How many more workers a Ray cluster has room for, which its autoscaler hears of as well.

Room is found out by asking for it: placement groups wait for the resources of a worker and are
given back as soon as they have them. While they wait, Ray's autoscaler counts them as demand, so a
cluster that can grow does.
"""

from __future__ import annotations

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
    """Places for workers that a run would like to have.

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

    def num_free(self, num_workers: int, *, at_least: int = 1) -> int:
        """How many of `num_workers` have room now; 0 while fewer than `at_least` have.

        The first `at_least` wait together: two runs that each held a part of what both need would
        wait for each other for ever. Raises `RayError` if the cluster's head does not answer.
        """
        if self._asked != (num_workers, at_least):
            self.give_back()
            self._asked = (num_workers, at_least)
        if not num_workers:
            return 0
        num_others = num_workers - at_least
        if self._first is None:
            self._first = self._ask(at_least)
        if self._rest is None and num_others:
            self._rest = self._ask(num_others)
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
        found = _has_room(groups)
        for group in groups:
            _give_back(group)
        return found

    def _ask(self, num_workers: int) -> PlacementGroup:
        return placement_group([self._worker] * num_workers, strategy="PACK")


def _give_back(group: PlacementGroup) -> None:
    with suppress(RayError):  # a head that is gone holds no places
        remove_placement_group(group)


def _has_room(groups: list[PlacementGroup], seconds: float = _ANSWER_SECONDS) -> int:
    """How many of the groups have their resources, within the time that Ray takes to tell."""
    deadline = time.monotonic() + seconds
    while True:
        states = [placement_group_table(group)["state"] for group in groups]
        num = states.count("CREATED")
        if num == len(groups) or time.monotonic() >= deadline:
            return num
        time.sleep(_POLL_SECONDS)
