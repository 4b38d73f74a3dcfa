"""The reader yields the images the order names, for any world, and never passes over damage."""

from __future__ import annotations

import errno
import io
import os
import struct
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ganscale.data.building import build_shards
from ganscale.data.order import Order
from ganscale.data.reader import Batch, BatchReader, DamagedSample, Images, ReadAhead, ShardImages
from ganscale.data.shards import ShardSet, verify_shards
from ganscale.data.sources import SourceSpec
from ganscale.errors import ConfigError, DataError
from ganscale.storage import StoreError, local

BATCH_SIZE = 8

LabelledImage = tuple[np.ndarray[Any, np.dtype[np.uint8]], int]


def order_of(shard_set: ShardSet) -> Order:
    sizes = [shard.num_samples for shard in shard_set.shards]
    return Order(sizes, num_streams=shard_set.num_streams, window=5, seed=3)


def reader_of(
    shard_set: ShardSet,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_error: Literal["fail", "skip"] = "fail",
) -> BatchReader:
    return BatchReader(
        shard_set,
        order_of(shard_set),
        ShardImages(shard_set),
        rank=rank,
        world_size=world_size,
        on_error=on_error,
    )


def source_numbers(shard_set: ShardSet) -> list[int]:
    """The numbers that the samples of a set had in its source."""
    numbers: list[int] = []
    for shard in shard_set.shards:
        with tarfile.open(f"{shard_set.location}/{shard.name}") as tar:
            names = dict.fromkeys(name.partition(".")[0] for name in tar.getnames())
        numbers += [int(name) for name in names]
    return numbers


def assert_equal_batches(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.slots, second.slots)


@pytest.mark.parametrize("position", [0, 30, 37, 1000])
def test_pixels_and_labels_are_those_of_the_source(
    images: list[LabelledImage], built_set: ShardSet, position: int
) -> None:
    numbers = source_numbers(built_set)
    batch = reader_of(built_set).read(position, BATCH_SIZE)
    slots = order_of(built_set).batch(position, BATCH_SIZE)
    expected = [numbers[sample] for sample in slots.samples.tolist()]
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64
    pixels = np.stack([np.moveaxis(images[number][0], -1, 0) for number in expected])
    assert np.array_equal(batch.images.numpy(), pixels)
    assert batch.labels.tolist() == [images[number][1] for number in expected]
    assert batch.slots.tolist() == list(range(BATCH_SIZE))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("position", [0, 32])
def test_ranks_together_read_the_global_batch(
    built_set: ShardSet, world_size: int, position: int
) -> None:
    whole = reader_of(built_set).read(position, BATCH_SIZE)
    parts = [
        reader_of(built_set, rank=rank, world_size=world_size).read(position, BATCH_SIZE)
        for rank in range(world_size)
    ]
    slots = torch.cat([part.slots for part in parts])
    assert sorted(slots.tolist()) == list(range(BATCH_SIZE))
    order = slots.argsort()
    union = Batch(
        torch.cat([part.images for part in parts])[order],
        torch.cat([part.labels for part in parts])[order],
        slots[order],
    )
    assert_equal_batches(union, whole)


@pytest.mark.parametrize("position", [0, 29])
def test_the_sequence_of_batches_is_that_of_single_reads(
    built_set: ShardSet, position: int
) -> None:
    reader = reader_of(built_set, rank=1, world_size=2)
    batches = reader.batches(position, BATCH_SIZE)
    for number, batch in enumerate(islice(batches, 7)):
        assert_equal_batches(batch, reader.read(position + number * BATCH_SIZE, BATCH_SIZE))


def test_a_rank_without_samples_gets_an_empty_batch(built_set: ShardSet) -> None:
    batch = reader_of(built_set, rank=3, world_size=4).read(0, 1)
    assert batch.images.shape == (0, 3, 16, 16)
    assert len(batch.labels) == len(batch.slots) == 0


def read_epoch(shard_set: ShardSet) -> None:
    reader_of(shard_set).read(0, shard_set.num_samples)


def assert_one_line_about(error: pytest.ExceptionInfo[DataError], path: Path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message


def test_a_truncated_shard_is_named(own_set: ShardSet) -> None:
    path = Path(own_set.location) / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="truncated") as error:
        read_epoch(own_set)
    assert_one_line_about(error, path)


def test_a_missing_shard_is_named(own_set: ShardSet) -> None:
    path = Path(own_set.location) / "shard-00003.tar"
    path.unlink()
    with pytest.raises(DataError, match="No such file") as error:
        read_epoch(own_set)
    assert_one_line_about(error, path)


def test_damage_in_a_prefetched_batch_comes_out_of_the_sequence(own_set: ShardSet) -> None:
    path = Path(own_set.location) / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(DataError) as error:
        list(islice(reader_of(own_set).batches(0, BATCH_SIZE), 6))
    assert_one_line_about(error, path)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_flipped_byte_of_pixel_data_is_named(own_set: ShardSet, fraction: float) -> None:
    path = Path(own_set.location) / "shard-00002.tar"
    data = path.read_bytes()
    chunk = data.index(b"IDAT")
    length = int.from_bytes(data[chunk - 4 : chunk], "big")
    flip(path, chunk + 4 + int(fraction * length))
    with pytest.raises(DataError) as error:
        read_epoch(own_set)
    assert_one_line_about(error, path)


@pytest.fixture(scope="module")
def smooth_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """One image that compresses well: a flipped bit need not break the stream."""
    folder = tmp_path_factory.mktemp("smooth")
    (folder / "in/class").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 4, (32, 32, 3))
    pixels = (3 * np.indices((32, 32, 3)).sum(0) + noise).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "in/class/0.png")
    return build_shards(SourceSpec("files", str(folder / "in")), folder / "set", num_shards=1)


def test_no_flipped_bit_of_pixel_data_changes_an_image_silently(smooth_set: ShardSet) -> None:
    path = Path(smooth_set.location) / "shard-00000.tar"
    sound = path.read_bytes()
    expected = reader_of(smooth_set).read(0, 1)
    chunk = sound.index(b"IDAT")
    length = int.from_bytes(sound[chunk - 4 : chunk], "big")
    silent = []
    for offset in range(chunk + 4, chunk + 4 + length, 5):
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        try:
            batch = reader_of(smooth_set).read(0, 1)
        except DataError:
            continue
        if not torch.equal(batch.images, expected.images):
            silent.append(offset)
    path.write_bytes(sound)
    assert not silent


@pytest.mark.parametrize("what", ["IHDR", "IDAT", "PNG"])
def test_a_flipped_byte_of_an_image_s_frame_is_named(own_set: ShardSet, what: str) -> None:
    path = Path(own_set.location) / "shard-00002.tar"
    flip(path, path.read_bytes().index(what.encode()) + 2)
    with pytest.raises(DamagedSample, match="CRC-32 differs") as error:
        read_epoch(own_set)
    assert_one_line_about(error, path)


@pytest.mark.parametrize("what", ["name", "checksum", "label"])
def test_damage_outside_the_images_changes_no_batch_and_fails_verification(
    own_set: ShardSet, what: str
) -> None:
    before = reader_of(own_set).read(0, own_set.num_samples)
    path = Path(own_set.location) / "shard-00002.tar"
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".cls"))
    places = {"name": member.offset, "checksum": member.offset + 150, "label": member.offset_data}
    flip(path, places[what])
    assert_equal_batches(reader_of(own_set).read(0, own_set.num_samples), before)
    (problem,) = verify_shards(own_set)
    assert str(path) in problem


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format="PNG")
    return buffer.getvalue()


def huge_png() -> bytes:
    """20,000 x 20,000 pixels in less than a hundred bytes."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    content = png_chunk(b"IDAT", zlib.compress(bytes(10)))
    return b"\x89PNG\r\n\x1a\n" + header + content + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (png(16, 8), "is 16x8 in mode RGB, expected 16x16"),
        (png(16, 16, "LA"), "has mode LA with transparency"),
        (png(16, 16, "L"), "in mode L, expected 16x16 in mode RGB"),
        (huge_png(), "is too large"),
        (png(16, 16)[:50], "cannot be decoded"),
        (b"<html>no image</html>", "is not an image"),
    ],
    ids=["size", "alpha", "gray", "20000x20000", "truncated", "html"],
)
def test_an_index_that_lies_about_an_image_is_found_when_it_is_read(
    own_set: ShardSet, image: bytes, words: str
) -> None:
    """The index agrees with the bytes, but they are not the image it promises."""
    (span,) = own_set.spans(np.array([7]))
    path = Path(own_set.location, span.name)
    data = bytearray(path.read_bytes())
    data[span.start : span.start + len(image)] = image
    path.write_bytes(data)
    samples = own_set.samples.copy()
    samples["num_bytes"][7], samples["crc32"][7] = len(image), zlib.crc32(image)
    replace(own_set, samples=samples).save(Path(own_set.location))
    lying = ShardSet.load(own_set.location)

    with pytest.raises(DamagedSample, match=words) as error:
        read_epoch(lying)
    assert_one_line_about(error, path)
    batch = reader_of(lying, on_error="skip").read(0, lying.num_samples)
    assert len(batch.images) == lying.num_samples - 1
    assert [words in str(error) for error in batch.skipped] == [True]


def damage_two(shard_set: ShardSet) -> set[int]:
    """Flip a bit in each of two samples; returns their numbers in the set."""
    for sample in (3, 30):
        (span,) = shard_set.spans(np.array([sample]))
        flip(Path(shard_set.location, span.name), span.start + span.length // 2)
    return {3, 30}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_skipping_leaves_out_the_same_samples_on_any_number_of_ranks(
    own_set: ShardSet, world_size: int
) -> None:
    damaged = damage_two(own_set)
    for position in range(0, 80, BATCH_SIZE):
        samples = order_of(own_set).batch(position, BATCH_SIZE).samples.tolist()
        expected = [place for place, sample in enumerate(samples) if sample not in damaged]
        parts = [
            reader_of(own_set, rank=rank, world_size=world_size, on_error="skip").read(
                position, BATCH_SIZE
            )
            for rank in range(world_size)
        ]
        assert sorted(torch.cat([part.slots for part in parts]).tolist()) == expected
        assert all(len(part.images) == len(part.labels) == len(part.slots) for part in parts)
        skipped = [error for part in parts for error in part.skipped]
        assert len(skipped) == BATCH_SIZE - len(expected)
        assert all(own_set.location in str(error) for error in skipped)


def test_a_missing_shard_can_be_skipped_and_is_counted(own_set: ShardSet) -> None:
    Path(own_set.location, "shard-00001.tar").unlink()
    batch = reader_of(own_set, on_error="skip").read(0, own_set.num_samples)
    assert len(batch.skipped) == own_set.shards[1].num_samples
    assert len(batch.images) == own_set.num_samples - own_set.shards[1].num_samples


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_disk_that_cannot_be_read_is_no_damaged_sample_to_skip(
    own_set: ShardSet, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    reader = reader_of(own_set, on_error="skip")
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StoreError, match=f"cannot be read: {os.strerror(code)}") as error:
        reader.read(0, BATCH_SIZE)
    assert own_set.location in str(error.value)


def test_threads_that_open_a_shard_at_the_same_time_all_read_it(
    own_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of their open files is kept for later, and the others' must live as long as a read."""
    together = threading.Barrier(4, timeout=60)

    class SlowlyOpened(local.OpenFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            together.wait()

    monkeypatch.setattr(local, "OpenFile", SlowlyOpened)
    store = local.LocalStore(own_set.location)
    (span,) = own_set.spans(np.array([0]))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store.read_spans([span])[0], range(4)))
    assert len(set(found)) == 1
    assert isinstance(found[0], bytes)


def test_closing_the_sequence_ends_its_threads(built_set: ShardSet) -> None:
    before = set(threading.enumerate())
    batches = reader_of(built_set).batches(0, BATCH_SIZE)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before


def test_closing_the_sequence_does_not_wait_for_shards_that_are_fetched(
    built_set: ShardSet,
) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    class Slow(ShardImages):
        def prefetch(self, samples: NDArray[np.int64]) -> None:
            begun.set()
            go_on.wait(5)
            done.set()

    ahead = ReadAhead(num_samples=8)
    reader = BatchReader(
        built_set, order_of(built_set), Slow(built_set), rank=0, world_size=1, ahead=ahead
    )
    batches = reader.batches(0, BATCH_SIZE)
    next(batches)
    assert begun.wait(100)
    batches.close()
    was_done = done.is_set()
    go_on.set()
    assert not was_done
    assert done.wait(100)


def test_no_more_than_the_prefetch_is_read_ahead(built_set: ShardSet) -> None:
    asked: list[int] = []

    class Counting(ShardImages):
        def read(self, samples: NDArray[np.int64]) -> Images:
            asked.append(len(samples))
            return super().read(samples)

    ahead = ReadAhead(num_batches=3)
    reader = BatchReader(
        built_set, order_of(built_set), Counting(built_set), rank=0, world_size=1, ahead=ahead
    )
    batches = reader.batches(0, BATCH_SIZE)
    for _ in range(5):
        next(batches)
    batches.close()
    assert 5 <= len(asked) <= 5 + 3


def test_more_workers_than_streams_are_refused(built_set: ShardSet) -> None:
    with pytest.raises(ConfigError, match="4 streams.*5 workers") as error:
        reader_of(built_set, rank=0, world_size=5)
    assert built_set.location in str(error.value)
