"""Cached pixels are the streamed ones, in the same order, shared by a node, and leave nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ganscale.data import decoded_cache
from ganscale.data.decoded_cache import DecodedImages, DevicePixels, HostPixels, choose_cache
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, ImageReader, Images, ShardImages
from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError
from tests.support.processes import FORKED

BATCH_SIZE = 8


def alone(value: Any) -> list[Any]:
    """What one process exchanges with itself."""
    return [value]


def reader_of(
    shard_set: ShardSet, images: ImageReader, *, rank: int = 0, world_size: int = 1
) -> BatchReader:
    sizes = [shard.num_samples for shard in shard_set.shards]
    order = Order(sizes, num_streams=shard_set.num_streams, window=5, seed=3)
    return BatchReader(shard_set, order, images, rank=rank, world_size=world_size, on_error="skip")


def cached(shard_set: ShardSet, kind: str) -> DecodedImages:
    shape, values = (shard_set.num_samples, *shard_set.image_shape), shard_set.values
    kept: HostPixels | DevicePixels
    if kind == "ram":
        kept = HostPixels(shape, rank=0, exchange=alone, dtype=values.numpy_dtype)
    else:
        kept = DevicePixels(shape, torch.device("cpu"), values.torch_dtype)
    return DecodedImages(ShardImages(shard_set), kept)


def assert_equal_sequences(
    first: BatchReader, second: BatchReader, position: int, num_batches: int
) -> None:
    pairs = zip(
        first.batches(position, BATCH_SIZE), second.batches(position, BATCH_SIZE), strict=False
    )
    for _, (one, other) in zip(range(num_batches), pairs, strict=False):
        assert torch.equal(one.images, other.images)
        assert one.images.dtype == other.images.dtype
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.slots, other.slots)
        assert [str(e) for e in one.skipped] == [str(e) for e in other.skipped]


@pytest.mark.parametrize("kind", ["ram", "device"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("position", [0, 31])
@pytest.mark.parametrize("name", ["built_set", "array_set"])
def test_batches_are_those_of_streaming_over_three_epochs(
    request: pytest.FixtureRequest, kind: str, world_size: int, position: int, name: str
) -> None:
    built_set: ShardSet = request.getfixturevalue(name)
    for rank in range(world_size):
        streamed = reader_of(built_set, ShardImages(built_set), rank=rank, world_size=world_size)
        kept = reader_of(built_set, cached(built_set, kind), rank=rank, world_size=world_size)
        assert_equal_sequences(streamed, kept, position, 3 * built_set.num_samples // BATCH_SIZE)


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_damage_is_met_each_time_as_in_streaming(own_set: ShardSet, kind: str) -> None:
    (span,) = own_set.spans(np.array([5]))
    path = Path(own_set.location, span.name)
    data = bytearray(path.read_bytes())
    data[span.start + 30] ^= 1
    path.write_bytes(data)
    streamed = reader_of(own_set, ShardImages(own_set))
    assert_equal_sequences(streamed, reader_of(own_set, cached(own_set, kind)), 0, 15)


class Counting(ShardImages):
    """Notes what it is asked for."""

    def __init__(self, shard_set: ShardSet) -> None:
        super().__init__(shard_set)
        self.asked: list[int] = []

    def read(self, samples: NDArray[np.int64]) -> Images:
        self.asked += samples.tolist()
        return super().read(samples)


def test_each_image_is_decoded_once(built_set: ShardSet) -> None:
    images = Counting(built_set)
    shape = (built_set.num_samples, *built_set.image_shape)
    cache = DecodedImages(images, HostPixels(shape, rank=0, exchange=alone))
    reader = reader_of(built_set, cache)
    for position in range(0, 4 * built_set.num_samples, BATCH_SIZE):
        reader.read(position, BATCH_SIZE)
    assert sorted(images.asked) == list(range(built_set.num_samples))


def test_what_is_in_memory_is_not_read_by_a_thread(built_set: ShardSet) -> None:
    reader = reader_of(built_set, cached(built_set, "ram"))
    reader.read(0, built_set.num_samples)
    before = set(threading.enumerate())
    batches = reader.batches(0, BATCH_SIZE)
    next(batches)
    assert set(threading.enumerate()) == before
    batches.close()


def _shared_write(rank: int, barrier: Barrier, queue: Any, results: Any) -> None:
    """One of two ranks: both map the memory, rank 0 writes, rank 1 reads."""

    def exchange(value: Any) -> list[Any]:
        for other in range(2):
            queue[other].put((rank, value))
        got = dict(queue[rank].get() for _ in range(2))
        barrier.wait()
        return [got[0], got[1]]

    pixels = HostPixels((4, 3, 2, 2), rank=rank, exchange=exchange)
    barrier.wait()
    # Of this process alone: other runs of this machine may be making theirs.
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if "/ganscale-" in line]
    assert mapped
    left = [line for line in mapped if not line.endswith("(deleted)")]
    if rank == 0:
        pixels.put(np.array([1, 3]), torch.full((2, 3, 2, 2), 7, dtype=torch.uint8))
    barrier.wait()
    results.put((rank, pixels.take(np.array([3, 0])).sum(dim=(1, 2, 3)).tolist(), left))


def test_the_processes_of_a_node_share_the_memory_and_no_file_is_left() -> None:
    barrier, results = FORKED.Barrier(2), FORKED.Queue()
    queues = [FORKED.Queue(), FORKED.Queue()]
    ranks = [
        FORKED.Process(target=_shared_write, args=(rank, barrier, queues, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = [results.get(timeout=600) for _ in ranks]
    for process in ranks:
        process.join()
    assert sorted((rank, sums) for rank, sums, _ in found) == [(0, [84, 0]), (1, [84, 0])]
    assert [left for *_, left in found] == [[], []]


def test_a_node_without_room_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "_reserve", lambda num_bytes: None)
    with pytest.raises(ConfigError, match=r"0\.00 GiB.*data\.cache=none"):
        HostPixels((4, 3, 2, 2), rank=0, exchange=alone)


@pytest.mark.parametrize(
    ("rooms", "num_bytes", "expected"),
    [
        ([(0, 1000)], 250, "ram"),
        ([(0, 1000)], 251, "none"),
        ([(0, 1000), (0, 100)], 100, "none"),
        ([(1000, 1000), (1000, 1000)], 100, "device"),
        ([(1000, 1000), (900, 1000)], 100, "ram"),
    ],
)
def test_auto_goes_by_the_rank_with_the_least_room(
    rooms: Sequence[tuple[int, int]], num_bytes: int, expected: str
) -> None:
    chosen = choose_cache("auto", num_bytes, torch.device("cpu"), lambda value: list(rooms))
    assert chosen == expected
