"""Batches from HTTP and S3 are those of the local disk, whatever the network does in between."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from filelock import FileLock
from moto.server import ThreadedMotoServer

from ganscale.data.decoded_cache import DecodedImages, DevicePixels, HostPixels
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, DamagedSample, ShardImages
from ganscale.data.shard_cache import CachedStore
from ganscale.data.shards import ShardSet, verify_shards
from ganscale.storage import ObjectStore, RetryPolicy, SlowStoreWarning, StoreError
from tests.support.http_server import Fault, FolderServer, serving
from tests.support.processes import FORKED

BATCH_SIZE = 20
POLICY = RetryPolicy(
    deadline_seconds=5, attempt_seconds=0.5, first_delay_seconds=0.01, max_delay_seconds=0.1
)


@pytest.fixture
def server(procedural_shards: Path, tmp_path: Path) -> Iterator[FolderServer]:
    """Serves a copy of 500 images in 12 shards."""
    shutil.copytree(procedural_shards, tmp_path / "served")
    with serving(tmp_path / "served") as state:
        yield state


@pytest.fixture(scope="module")
def s3_url(procedural_shards: Path) -> Iterator[str]:
    """The same set in a bucket; endpoint and credentials are in the environment."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in procedural_shards.iterdir():
            client.upload_file(str(path), "shards", f"set/{path.name}")
        client.close()
        yield "s3://shards/set"
    moto.stop()


def cached(shard_set: ShardSet, folder: Path, limit_bytes: int | None = None) -> CachedStore:
    assert isinstance(shard_set.store, ObjectStore)
    return CachedStore(shard_set.store, shard_set.shards, folder, limit_bytes)


def reader(
    shard_set: ShardSet,
    images: ShardImages | DecodedImages | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchReader:
    sizes = [shard.num_samples for shard in shard_set.shards]
    order = Order(sizes, num_streams=shard_set.num_streams, window=16, seed=1)
    images = images or ShardImages(shard_set)
    return BatchReader(shard_set, order, images, rank=rank, world_size=world_size)


def digest(reader: BatchReader, positions: list[int]) -> str:
    """sha256 over the batches at some positions."""
    state = hashlib.sha256()
    for position in positions:
        batch = reader.read(position, BATCH_SIZE)
        for part in (batch.images, batch.labels, batch.slots):
            state.update(part.numpy().tobytes())
    return state.hexdigest()


EPOCH = list(range(0, 500, BATCH_SIZE))


@pytest.fixture(scope="module")
def expected(procedural_shards: Path) -> str:
    """The digest of an epoch from the local disk."""
    return digest(reader(ShardSet.load(procedural_shards)), EPOCH)


@pytest.mark.parametrize("num_positions", [4, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_batches_are_equal_from_every_store_and_cache_on_any_workers(
    procedural_shards: Path, server: FolderServer, s3_url: str, tmp_path: Path, num_positions: int
) -> None:
    positions = np.random.default_rng(0).integers(0, 10_000, num_positions).tolist()
    local = ShardSet.load(procedural_shards)
    remote = [ShardSet.load(url, POLICY) for url in (server.url, s3_url)]
    shape = (local.num_samples, *local.image_shape)
    ways: list[tuple[ShardSet, Any]] = [
        *((shard_set, None) for shard_set in remote),
        (remote[1], ShardImages(remote[1], cached(remote[1], tmp_path / "cache"))),
        (
            local,
            DecodedImages(
                ShardImages(local), HostPixels(shape, rank=0, exchange=lambda value: [value])
            ),
        ),
        (local, DecodedImages(ShardImages(local), DevicePixels(shape, torch.device("cpu")))),
    ]
    for world_size in (1, 2, 3, 5, 8) if num_positions == 4 else range(1, 9):
        for rank in range(world_size):
            wanted = digest(reader(local, rank=rank, world_size=world_size), positions)
            for shard_set, images in ways:
                part = reader(shard_set, images, rank=rank, world_size=world_size)
                assert digest(part, positions) == wanted


def test_two_hundred_random_positions_resume_equally_from_s3(
    procedural_shards: Path, s3_url: str, tmp_path: Path
) -> None:
    positions = np.random.default_rng(1).integers(0, 100_000, 200).tolist()
    shard_set = ShardSet.load(s3_url, POLICY)
    images = ShardImages(shard_set, cached(shard_set, tmp_path / "cache"))
    wanted = digest(reader(ShardSet.load(procedural_shards)), positions)
    assert digest(reader(shard_set, images), positions) == wanted


def test_a_remote_set_verifies(s3_url: str) -> None:
    assert verify_shards(ShardSet.load(s3_url, POLICY)) == []


@pytest.mark.parametrize(
    "fault", ["cut", "reset", pytest.param("stall", marks=pytest.mark.slow), "no length", "503"]
)
@pytest.mark.parametrize("kept", [False, True], ids=["ranges", "cache_dir"])
def test_every_tenth_request_going_wrong_changes_no_batch(
    server: FolderServer, expected: str, tmp_path: Path, fault: Fault, kept: bool
) -> None:
    server.fault = lambda number, name: fault if number % 10 == 3 else None
    shard_set = ShardSet.load(server.url, POLICY)
    images = ShardImages(shard_set, cached(shard_set, tmp_path / "cache") if kept else None)
    assert digest(reader(shard_set, images), EPOCH) == expected
    assert server.num_requests > 10


def test_a_server_that_ignores_ranges_works_and_is_named(
    server: FolderServer, expected: str, tmp_path: Path
) -> None:
    server.fault = lambda number, name: "no range"
    shard_set = ShardSet.load(server.url, POLICY)
    images = ShardImages(shard_set, cached(shard_set, tmp_path / "cache"))
    with pytest.warns(SlowStoreWarning, match=f"{server.url} ignores Range"):
        digest(reader(shard_set), EPOCH[:1])
    assert digest(reader(shard_set, images), EPOCH) == expected


def storm(server: FolderServer, expected: str, seconds: float) -> None:
    """Read an epoch while every request is refused for a while."""
    shard_set = ShardSet.load(server.url, RetryPolicy(deadline_seconds=60))
    began = time.monotonic()
    server.fault = lambda number, name: "503" if time.monotonic() - began < seconds else None
    assert digest(reader(shard_set), EPOCH) == expected
    assert time.monotonic() - began > seconds


def test_a_storm_of_refusals_is_survived(server: FolderServer, expected: str) -> None:
    storm(server, expected, seconds=2)


@pytest.mark.slow
def test_a_storm_of_twenty_seconds_is_survived(server: FolderServer, expected: str) -> None:
    with pytest.warns(SlowStoreWarning, match=r"could not be read so far \(.*503"):
        storm(server, expected, seconds=20)


@pytest.mark.parametrize("fault", ["stall", "503", "reset"])
def test_a_dead_store_is_an_error_within_the_deadline(server: FolderServer, fault: Fault) -> None:
    policy = RetryPolicy(deadline_seconds=1.5, attempt_seconds=0.4, first_delay_seconds=0.05)
    shard_set = ShardSet.load(server.url, policy)
    server.fault = lambda number, name: fault
    words = r"/shard-000\d\d\.tar could not be read within 1\.5 s, \d+ attempts; last: \w+"
    with pytest.raises(StoreError, match=words) as error:
        next(reader(shard_set).batches(0, BATCH_SIZE))
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refusal_and_a_missing_shard_are_errors_at_once(server: FolderServer) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    asked: list[str] = []

    def refuse(number: int, name: str) -> Fault:
        asked.append(name)
        return "403"

    server.fault = refuse
    with pytest.raises(StoreError, match="is refused"):
        reader(shard_set).read(0, BATCH_SIZE)
    assert len(asked) <= BATCH_SIZE  # no sample is asked for a second time
    server.fault = lambda number, name: "404" if name == "shard-00003.tar" else None
    with pytest.raises(DamagedSample, match=r"shard-00003\.tar: no such file"):
        digest(reader(shard_set), EPOCH)


def test_a_shard_is_fetched_once_for_all_readers(server: FolderServer, tmp_path: Path) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    before = server.num_requests
    for _ in range(3):
        images = ShardImages(shard_set, cached(shard_set, tmp_path / "cache"))
        digest(reader(shard_set, images), EPOCH)
    assert server.num_requests - before == len(shard_set.shards)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bits(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data), 1700):
        data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_in_half, flip_bits])
def test_a_damaged_entry_is_fetched_again(
    server: FolderServer, expected: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    digest(reader(shard_set, ShardImages(shard_set, cached(shard_set, tmp_path / "c"))), EPOCH)
    damage(next((tmp_path / "c").glob("*.tar")))
    before = server.num_requests
    images = ShardImages(shard_set, cached(shard_set, tmp_path / "c"))
    assert digest(reader(shard_set, images), EPOCH) == expected
    assert server.num_requests - before == 1


@pytest.mark.parametrize("kept", [False, True], ids=["ranges", "cache_dir"])
def test_bits_flipped_on_the_way_are_fetched_again(
    server: FolderServer, expected: str, tmp_path: Path, kept: bool
) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    server.fault = lambda number, name: "flip" if number % 30 == 3 else None
    images = ShardImages(shard_set, cached(shard_set, tmp_path / "cache") if kept else None)
    assert digest(reader(shard_set, images), EPOCH) == expected


@pytest.mark.parametrize("damage", [cut_in_half, flip_bits])
def test_what_is_damaged_in_the_store_is_met_alike_with_and_without_a_cache(
    server: FolderServer, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(server.folder / "shard-00004.tar")
    shard_set = ShardSet.load(server.url, POLICY)
    found = []
    for images in (
        ShardImages(shard_set),
        ShardImages(shard_set, cached(shard_set, tmp_path / "cache")),
    ):
        skipping = reader(shard_set, images)
        skipping.on_error = "skip"
        found.append([len(skipping.read(p, BATCH_SIZE).skipped) for p in EPOCH])
    assert found[0] == found[1]
    assert 1 <= sum(found[0]) < shard_set.shards[4].num_samples


def test_the_cache_keeps_to_its_limit(server: FolderServer, expected: str, tmp_path: Path) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    limit = 5 * max(shard.num_bytes for shard in shard_set.shards)
    images = ShardImages(shard_set, cached(shard_set, tmp_path / "cache", limit))
    assert digest(reader(shard_set, images), EPOCH) == expected
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.t*"))
    assert 0 < held <= limit


def test_a_fetch_waits_for_room_while_others_open_what_could_be_evicted(
    server: FolderServer, tmp_path: Path
) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    first, second, *_ = shard_set.shards
    limit = max(shard.num_bytes for shard in shard_set.shards)
    cache, other = (cached(shard_set, tmp_path, limit) for _ in range(2))
    cache.prefetch([first.name])
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "locks" / f"{first.sha256}.lock"):
            fetch = pool.submit(other.prefetch, [second.name])
            time.sleep(0.3)
            assert [path.stem for path in tmp_path.glob("*.t*")] == [first.sha256]
        fetch.result()
    assert [path.stem for path in tmp_path.glob("*.t*")] == [second.sha256]


@pytest.mark.timeout(120)
def test_what_a_killed_fetch_left_makes_room_for_the_next_one(
    server: FolderServer, tmp_path: Path
) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    shard = max(shard_set.shards, key=lambda shard: shard.num_bytes)
    cache = cached(shard_set, tmp_path, shard.num_bytes)
    (tmp_path / f"{shard.sha256}.tmp").write_bytes(bytes(shard.num_bytes))
    cache.prefetch([shard.name])
    assert [path.name for path in tmp_path.glob("*.t*")] == [f"{shard.sha256}.tar"]


def test_closing_begins_no_further_fetch_and_waits_for_none(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = ShardSet.load(server.url, POLICY)
    images = ShardImages(shard_set, cached(shard_set, tmp_path))
    begun: list[str] = []
    all_busy, go_on = threading.Event(), threading.Event()

    def chunks(name: str, num_bytes: int | None = None) -> Iterator[bytes]:
        begun.append(name)
        if len(begun) == 4:
            all_busy.set()
        assert go_on.wait(100)
        yield from original(name, num_bytes)

    assert isinstance(images.store, CachedStore)
    original = images.store.store.chunks
    monkeypatch.setattr(images.store.store, "chunks", chunks)
    with ThreadPoolExecutor(1) as pool:
        prefetch = pool.submit(images.prefetch, np.arange(shard_set.num_samples))
        assert all_busy.wait(100)
        reader(shard_set, images).close()
        go_on.set()
        assert isinstance(prefetch.exception(), CancelledError)
    assert len(begun) == 4


def _read_for(url: str, folder: str, seconds: float, rank: int, results: Any) -> None:
    """One of two workers on a node, whose cache holds four of twelve shards."""
    shard_set = ShardSet.load(url, POLICY)
    limit = 4 * max(shard.num_bytes for shard in shard_set.shards)
    images = ShardImages(shard_set, cached(shard_set, Path(folder), limit))
    digests: set[str] = set()
    began = time.monotonic()
    while not digests or time.monotonic() - began < seconds:
        digests.add(digest(reader(shard_set, images, rank=rank, world_size=2), EPOCH[:3]))
    results.put((rank, digests))


def two_workers(server: FolderServer, local: Path, folder: Path, seconds: float) -> None:
    results = FORKED.Queue()
    workers = [
        FORKED.Process(target=_read_for, args=(server.url, str(folder), seconds, rank, results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=seconds + 120) for _ in workers)
    for worker in workers:
        worker.join()
    shard_set = ShardSet.load(local)
    for rank in range(2):
        wanted = digest(reader(shard_set, rank=rank, world_size=2), EPOCH[:3])
        assert found[rank] == {wanted}


def test_a_worker_killed_while_it_fetches_leaves_nothing_that_is_taken_for_a_shard(
    server: FolderServer, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    server.fault = lambda number, name: "stall" if name.endswith(".tar") else None
    arguments = (server.url, str(folder), 60, 0, FORKED.Queue())
    worker = FORKED.Process(target=_read_for, args=arguments)
    worker.start()
    while not list(folder.glob("*.tmp")):
        assert worker.is_alive()
        time.sleep(0.01)
    worker.kill()
    worker.join()
    assert not list(folder.glob("*.tar"))

    server.fault = lambda number, name: None
    shard_set = ShardSet.load(server.url, POLICY)
    images = ShardImages(shard_set, cached(shard_set, folder))
    assert digest(reader(shard_set, images), EPOCH) == expected
    assert not list(folder.glob("*.tmp"))


def test_two_workers_evict_from_under_each_other(
    server: FolderServer, procedural_shards: Path, tmp_path: Path
) -> None:
    two_workers(server, procedural_shards, tmp_path / "cache", seconds=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_evict_from_under_each_other_for_ten_minutes(
    server: FolderServer, procedural_shards: Path, tmp_path: Path
) -> None:
    two_workers(server, procedural_shards, tmp_path / "cache", seconds=600)
