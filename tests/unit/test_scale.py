"""A million samples in a thousand shards: an instant resume, a small index, memory that stays.

The shards are hard links to one tar of a thousand images, so the set costs two megabytes of disk;
nothing in the reader knows.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from ganscale.data.building import build_shards
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, ShardImages
from ganscale.data.shards import ShardSet
from ganscale.data.sources import SourceSpec

NUM_SHARDS = 1000
SHARD_SIZE = 1000


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 shards of 1,000 gray 16x16 images in 64 streams."""
    root = tmp_path_factory.mktemp("million")
    (root / "in").mkdir()
    for number in range(10):
        pixels = np.full((16, 16), number, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"in/{number}.png")
    small = build_shards(SourceSpec("files", str(root / "in")), root / "one", num_shards=1)
    tar = Path(small.location, small.shards[0].name).read_bytes()
    members = tar[: tar.rindex(b"IEND")]
    body = tar[: -(-len(members) // 512) * 512]
    big = body * (SHARD_SIZE // 10) + bytes(1024)
    rows = np.tile(small.samples, SHARD_SIZE // 10)
    rows["block"] += np.repeat(np.arange(SHARD_SIZE // 10) * (len(body) // 512), 10).astype("u4")
    out = root / "set"
    out.mkdir()
    (out / "shard-00000.tar").write_bytes(big)
    shards = []
    for number in range(NUM_SHARDS):
        name = f"shard-{number:05d}.tar"
        if number:
            os.link(out / "shard-00000.tar", out / name)
        shards.append(
            replace(small.shards[0], name=name, num_bytes=len(big), num_samples=SHARD_SIZE)
        )
    replace(small, num_streams=64, shards=tuple(shards), samples=np.tile(rows, NUM_SHARDS)).save(
        out
    )
    return out


def open_reader(root: Path, num_streams: int = 64) -> BatchReader:
    shard_set = replace(ShardSet.load(root), num_streams=num_streams)
    order = Order(
        [shard.num_samples for shard in shard_set.shards],
        num_streams=shard_set.num_streams,
        window=1024,
        seed=0,
    )
    return BatchReader(shard_set, order, ShardImages(shard_set), rank=0, world_size=1)


def test_the_first_batch_after_a_resume_takes_a_second_of_work_at_most(million: Path) -> None:
    for position in np.random.default_rng(0).integers(0, 50_000_000, 5).tolist():
        began = time.process_time()  # of this process, however busy the machine is
        batches = open_reader(million).batches(position, 128)
        batch = next(batches)
        seconds = time.process_time() - began
        batches.close()
        assert batch.images.shape == (128, 1, 16, 16)
        assert seconds < 1.0


def test_the_index_takes_sixteen_bytes_a_sample_and_the_order_a_few_blocks(million: Path) -> None:
    tracemalloc.start()
    reader = open_reader(million)
    for position in range(0, 2_000_000, 500_000):
        reader.order.batch(position, 128)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    blocks = 3 * 64 * 1024 * 16  # three blocks of 64 windows, a stream and a sample each
    assert ShardSet.load(million).samples.nbytes == 16 * NUM_SHARDS * SHARD_SIZE
    assert held < 16 * NUM_SHARDS * SHARD_SIZE + blocks + 2e6


def test_the_reader_s_memory_does_not_grow_with_the_shards_it_has_read(million: Path) -> None:
    process = psutil.Process()
    num_files = process.num_fds()  # other tests have run in this process
    batches = open_reader(million, num_streams=NUM_SHARDS).batches(0, NUM_SHARDS)
    sizes = []
    for _ in range(3):
        for _ in islice(batches, 20):  # each batch has a sample of every shard
            pass
        sizes.append(process.memory_info().rss)
        assert process.num_fds() < num_files + 200
    batches.close()
    assert sizes[2] - sizes[0] < 8e6
