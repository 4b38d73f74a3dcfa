"""Parts of steps add up to what the clock says, whatever is a step and however late a GPU is."""

from __future__ import annotations

import time

import pytest
import torch

from ganscale.tracking import step_times
from ganscale.tracking.stats import WorkerStats, worker_columns
from ganscale.tracking.step_times import StepTimes

CPU = torch.device("cpu")


class FakeDevice:
    """Stamps that pass when the test says so; `now` is the time of the next one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.passed = 0.0
        self.waited_for: list[float] = []

    def times(self) -> StepTimes:
        return StepTimes(
            CPU, stamp=lambda: self.now, seconds=self._seconds, has_passed=self._has_passed
        )

    def _has_passed(self, stamp: object) -> bool:
        assert isinstance(stamp, float)
        return stamp <= self.passed

    def _seconds(self, begin: object, end: object) -> float:
        assert isinstance(begin, float)
        assert isinstance(end, float)
        if end > self.passed:
            self.waited_for.append(end)
        return end - begin


def step(device: FakeDevice, times: StepTimes, *parts: tuple[str, float]) -> None:
    for part, seconds in parts:
        times.enter(part)
        device.now += seconds
    times.num_steps += 1


def test_parts_are_means_over_steps() -> None:
    device = FakeDevice()
    times = device.times()
    step(device, times, ("data_wait", 0.5), ("discriminator", 2.0), ("generator", 1.0))
    step(device, times, ("data_wait", 1.5), ("discriminator", 4.0))
    assert times.means() == {"data_wait": 1.0, "discriminator": 3.0, "generator": 0.5}
    assert times.num_steps == 0


def test_what_follows_the_means_belongs_to_the_next_ones_only_when_it_is_named() -> None:
    device = FakeDevice()
    times = device.times()
    step(device, times, ("write", 1.0))
    times.means()
    device.now += 100.0
    step(device, times, ("write", 2.0))
    assert times.means() == {"write": 2.0}


def test_many_stamps_are_added_up_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "_MAX_MARKS", 8)
    device = FakeDevice()
    times = device.times()
    for count in range(50):
        device.passed = device.now - 3.0  # the device lags behind the host
        step(device, times, ("data_wait", 0.25), ("discriminator", 0.75))
        assert len(times._marks) <= 8 + 8, count
    assert device.waited_for == []
    assert times.means() == {"data_wait": 0.25, "discriminator": 0.75}
    assert device.waited_for  # what had not passed is waited for when a row is logged


def test_the_hosts_clock_times_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 10.25, 12.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    times = StepTimes(CPU)
    times.enter("data_wait")
    times.enter("generator")
    times.num_steps = 2
    assert times.means() == {"data_wait": 0.125, "generator": 1.0}


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    times = StepTimes(torch.device("cuda"))
    times.enter("busy")
    torch.cuda._sleep(200_000_000)  # returns at once; the device is busy for about 0.1 s
    times.enter("idle")
    times.num_steps = 1
    means = times.means()
    assert means["busy"] > 0.03
    assert means["idle"] < means["busy"] / 10


def test_a_row_has_means_of_times_and_each_workers_own() -> None:
    workers = [
        {"data_wait_seconds": 1.0, "generator_seconds": 2.0, "cpu_percent": 90.0},
        {"data_wait_seconds": 3.0, "generator_seconds": 2.0, "cpu_percent": 50.0},
    ]
    assert worker_columns(workers) == {
        "time/data_wait_seconds": 2.0,
        "time/generator_seconds": 2.0,
        "workers/0/data_wait_seconds": 1.0,
        "workers/0/cpu_percent": 90.0,
        "workers/1/data_wait_seconds": 3.0,
        "workers/1/cpu_percent": 50.0,
    }


def test_rows_stay_short_with_many_workers() -> None:
    row = worker_columns([{"data_wait_seconds": float(rank)} for rank in range(100)])
    assert row["time/data_wait_seconds"] == 49.5
    assert sum(name.startswith("workers/") for name in row) == 16


def test_a_worker_measures_itself() -> None:
    figures = WorkerStats(CPU)
    block = bytearray(64 * 2**20)
    found = figures.measure({"data_wait": 0.5})
    assert found["data_wait_seconds"] == 0.5
    assert 64 / 1024 < found["memory_gib"] < 64
    assert found["cpu_percent"] >= 0
    assert len(block) == 64 * 2**20
