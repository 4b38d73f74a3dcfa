"""The model of many GPUs: its formulas by hand, and what it counts against known numbers."""

from __future__ import annotations

import math

import pytest

from benchmarks.scaling_model import (
    AllReduce,
    Exchange,
    Links,
    Measurement,
    exchange_of,
    modelled_step,
)

LINKS = Links(
    gpus_per_node=4,
    nvlink_bytes=200e9,
    network_bytes=10e9,
    efficiency=0.5,
    launch_seconds=1e-3,
    hop_seconds=1e-4,
)


@pytest.mark.parametrize(
    ("num_gpus", "expected"),
    [
        (1, 0.0),
        # Within a node: 2 * 3/4 of a gigabyte at half of 200 GB/s, and one launch.
        (4, 0.015 + 1e-3),
        # Four nodes: 2 * 15/16 of it at half of 10 GB/s, a launch, and two messages a doubling.
        (16, 0.375 + 1e-3 + 4 * 1e-4),
    ],
)
def test_an_all_reduce_is_a_ring_and_its_latency(num_gpus: int, expected: float) -> None:
    assert LINKS.all_reduce_seconds(1e9, num_gpus) == pytest.approx(expected)


def test_a_step_adds_up_what_is_waited_for() -> None:
    measurement = Measurement("any", batch_size=10, images_per_second=100)
    tables, sums = AllReduce(1000, grows=True, count=3), AllReduce(8, grows=False, count=0.5)
    exchange = Exchange({"G": 10**9, "D": 10**8}, statistics=(tables, sums), row_seconds=1e-3)
    alone = modelled_step(measurement, exchange, 1, LINKS, 5)
    assert alone.seconds == 0.1
    step = modelled_step(measurement, exchange, 4, LINKS, 5)
    # G is updated in one of five steps only.
    assert step.gradients == pytest.approx((0.0015 + 1e-3) + (0.015 + 1e-3) / 5)
    # The tables have a row for each of the four ranks.
    tables_seconds = 3 * (2 * 3 / 4 * 4000 / 100e9 + 1e-3)
    assert step.statistics == pytest.approx(
        tables_seconds + 0.5 * (2 * 3 / 4 * 8 / 100e9 + 1e-3), rel=1e-12
    )
    assert step.seconds == pytest.approx(0.1 + step.gradients + step.statistics)
    # Each rank draws the random numbers of all ranks' images, while the last step runs.
    many = modelled_step(measurement, exchange, 100, LINKS, 5)
    assert many.inputs == pytest.approx(1.0)
    assert many.seconds == pytest.approx(1.0)


def test_what_dcgan_exchanges_is_counted() -> None:
    exchange = exchange_of("dcgan-cifar10")
    # Convolutions of 4x4 and the weights and biases of batch norms, at 64 channels, z of 100.
    generator = 100 * 256 * 16 + 2 * 256
    discriminator = 3 * 64 * 16 + 64
    for wide, narrow in ((256, 128), (128, 64)):
        generator += wide * narrow * 16 + 2 * narrow
        discriminator += narrow * wide * 16 + 2 * wide
    generator += 64 * 3 * 16 + 3
    discriminator += 256 * 16 + 1
    assert exchange.gradient_bytes == {"G": 4 * generator, "D": 4 * discriminator}
    # Three layers of batch norm in G and two in D. D's phase: a forward of G, two of D and as many
    # backwards; G's: a forward and a backward of both.
    assert sum(each.count for each in exchange.statistics) == 3 + 2 * 2 * 2 + 2 * (3 + 2)
    # Forwards exchange a mean, a sum of squares of each channel and a count for every rank.
    forwards = {4 * (2 * channels + 1) for channels in (64, 128, 256)}
    assert {each.num_bytes for each in exchange.statistics if each.grows} == forwards
    backwards = {4 * 2 * channels for channels in (64, 128, 256)}
    assert {each.num_bytes for each in exchange.statistics if not each.grows} == backwards
    assert 0 < exchange.row_seconds < 1e-3
    assert math.isfinite(exchange.row_seconds)
