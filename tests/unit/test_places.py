"""What is asked of a Ray cluster to find out its room, with a head that is replaced by a table."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ganscale.launch import places as module
from ganscale.launch.places import Places


class Head:
    """Places one worker for each CPU, in the order in which groups came; may forget all groups."""

    def __init__(self, num_cpus: int) -> None:
        self.num_cpus = num_cpus
        self.groups: dict[object, int] = {}
        self.lock = threading.Lock()

    def create(self, bundles: list[dict[str, float]], strategy: str) -> object:
        group = object()
        with self.lock:
            self.groups[group] = len(bundles)
        return group

    def remove(self, group: object) -> None:
        assert group is not None
        with self.lock:
            self.groups.pop(group, None)

    def table(self, group: object) -> dict[str, Any]:
        assert group is not None
        with self.lock:
            if group not in self.groups:
                return {}
            left = self.num_cpus
            for other, size in self.groups.items():
                if size <= left:
                    left -= size
                    if other is group:
                        return {"state": "CREATED"}
            return {"state": "PENDING"}


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    head = Head(num_cpus=3)
    monkeypatch.setattr(module, "placement_group", head.create)
    monkeypatch.setattr(module, "remove_placement_group", head.remove)
    monkeypatch.setattr(module, "placement_group_table", head.table)
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.005)
    return head


@pytest.mark.parametrize(
    ("num_workers", "at_least", "free"), [(0, 1, 0), (2, 1, 2), (8, 1, 3), (8, 3, 3), (8, 4, 0)]
)
def test_as_many_as_the_cluster_has_are_free_but_none_below_the_fewest(
    head: Head, num_workers: int, at_least: int, free: int
) -> None:
    places = Places({"CPU": 1.0})
    assert places.num_free(num_workers, at_least=at_least) == free
    places.give_back()
    assert head.groups == {}


def test_a_head_that_has_forgotten_what_waits_is_asked_again(head: Head) -> None:
    places = Places({"CPU": 1.0})
    head.num_cpus = 0
    assert places.num_free(4, at_least=2) == 0
    head.groups.clear()
    assert places.num_free(4, at_least=2) == 0
    assert sorted(head.groups.values()) == [2, 2]
    head.num_cpus = 4
    assert places.num_free(4, at_least=2) == 4
    assert head.groups == {}


def test_a_head_that_forgets_during_a_look_has_no_room(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places({"CPU": 1.0})
    monkeypatch.setattr(module, "placement_group_table", lambda group: {})
    assert places.num_free(2) == 0


def test_threads_may_ask_and_give_back_at_the_same_time(head: Head) -> None:
    """As the thread that watches for room does while another begins to start a group."""
    head.num_cpus = 1
    places, errors = Places({"CPU": 1.0}), []

    def ask() -> None:
        try:
            for _ in range(5):
                places.num_free(4, at_least=2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        places.give_back()
    thread.join()
    places.give_back()
    assert errors == []
    assert head.groups == {}
