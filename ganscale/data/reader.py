"""Samples of the global order as batches of tensors, for one rank.

The order says which samples; the index says where their bytes lie. So a batch is one round of
ranged reads, and skipping to a position reads nothing on the way. Every sample's CRC is compared
and its header checked before it is decoded. A damaged sample is an error that names shard and
sample, or, with `on_error="skip"`, it is missing from the batch of whichever rank it falls to, and
reported. There is never a wrong image and never a batch that is shorter without a report.

Reading ahead uses threads and not processes: file reads, zlib and the PNG decoder all release the
interpreter's lock, and pixels need not be sent from one process to another.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ganscale.data.images import png_decoder
from ganscale.data.order import BatchIndices, Order
from ganscale.data.shard_cache import CachedStore
from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError, DataError
from ganscale.storage import MissingData, Span, Store


class DamagedSample(DataError):
    """A sample whose bytes are missing, not those that were indexed, or not the expected image."""


@dataclass(frozen=True)
class DeviceRows:
    """Images that are on a device already: rows of a table, to be gathered there by an index."""

    table: torch.Tensor
    """(N, C, H, W), on the device"""
    index: torch.Tensor
    """int64 (n,), on the host"""

    def gather(self) -> torch.Tensor:
        """The images (n, C, H, W), on the device."""
        return self.table.index_select(0, self.index.to(self.table.device))


@dataclass(frozen=True)
class Images:
    """Some samples' pixels, or values where the set has arrays, without the damaged ones."""

    stored: torch.Tensor | DeviceRows
    """(n, C, H, W) of the set's type (uint8, float32), or where they are on the device"""
    valid: NDArray[np.bool_]
    """(asked,) which of the samples that were asked for these are."""
    damaged: tuple[DamagedSample, ...] = ()

    @property
    def pixels(self) -> torch.Tensor:
        """The images (n, C, H, W), on the reader's device."""
        return self.stored.gather() if isinstance(self.stored, DeviceRows) else self.stored


class ImageReader(Protocol):
    """Where a batch's pixels come from: shards, or a cache of decoded images before them."""

    def read(self, samples: NDArray[np.int64]) -> Images:
        """The pixels of some samples of the set, in the order asked for."""
        ...

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Fetch what `read` of these samples will need, where that takes a while."""
        ...

    def is_cached(self, samples: NDArray[np.int64]) -> bool:
        """Whether `read` would only copy memory, so that a thread to read ahead costs more."""
        ...

    def close(self) -> None:
        """Nothing is read any more: begin no further fetch, and wait for none."""
        ...


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch."""

    stored: torch.Tensor | DeviceRows
    """(n, C, H, W) of the set's type (uint8, float32), or where they are on the device"""
    labels: torch.Tensor
    """int64, (n,); -1 where the set has none"""
    slots: torch.Tensor
    """int64, (n,): which of the global batch's places these are."""
    skipped: tuple[DamagedSample, ...] = ()
    """Samples of this rank's part that are missing because they are damaged."""

    @property
    def images(self) -> torch.Tensor:
        """The images (n, C, H, W), on the reader's device."""
        return self.stored.gather() if isinstance(self.stored, DeviceRows) else self.stored


class ShardImages:
    """Reads and decodes images from the shards each time they are asked for."""

    def __init__(self, shard_set: ShardSet, store: Store | CachedStore | None = None) -> None:
        self.shard_set = shard_set
        self.store = store or shard_set.store
        png_decoder()  # takes seconds to load, which must not pass within a step

    def read(self, samples: NDArray[np.int64]) -> Images:
        crc32s = self.shard_set.samples["crc32"][samples].tolist()
        contents = self._read_spans(self.shard_set.spans(samples), crc32s)
        shape = (len(samples), *self.shard_set.image_shape)
        pixels = np.empty(shape, dtype=self.shard_set.values.numpy_dtype)
        valid = np.ones(len(samples), dtype=np.bool_)
        damaged = []
        for place, (data, crc32) in enumerate(zip(contents, crc32s, strict=True)):
            try:
                pixels[place] = self._decoded(data, crc32)
            except DataError as error:
                valid[place] = False
                where = self.shard_set.describe(int(samples[place]))
                damaged.append(DamagedSample(f"{where}: {error}. Run: ganscale shards verify"))
        if damaged:  # else without a copy, which is the case that must be fast
            pixels = pixels[valid]
        return Images(torch.from_numpy(pixels), valid, tuple(damaged))

    def _read_spans(self, spans: list[Span], crc32s: list[int]) -> list[bytes | MissingData]:
        """The bytes of spans; those that differ from the index are read a second time.

        Bytes that were damaged on their way are right then. What differs twice is damaged at rest.
        """
        contents = self.store.read_spans(spans)
        doubtful = [place for place, data in enumerate(contents) if not _is(data, crc32s[place])]
        if doubtful:
            again = self.store.read_spans([spans[place] for place in doubtful])
            for place, data in zip(doubtful, again, strict=True):
                contents[place] = data
        return contents

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        if isinstance(self.store, CachedStore):
            numbers = np.unique(self.shard_set.shards_of(samples)).tolist()
            self.store.prefetch([self.shard_set.shards[number].name for number in numbers])

    def is_cached(self, samples: NDArray[np.int64]) -> bool:
        return False

    def close(self) -> None:
        if isinstance(self.store, CachedStore):
            self.store.close()

    def _decoded(self, data: bytes | MissingData, crc32: int) -> NDArray[Any]:
        if isinstance(data, MissingData):
            raise data
        if not _is(data, crc32):
            raise DataError("damaged, its CRC-32 differs from the index")
        return self.shard_set.encoding.decode(data, self.shard_set.image_shape)


def _is(data: bytes | MissingData, crc32: int) -> bool:
    return isinstance(data, bytes) and zlib.crc32(data) == crc32


@dataclass(frozen=True)
class ReadAhead:
    """What is done before a batch is asked for."""

    num_threads: int = 1
    """Batches that are read at once."""
    num_batches: int = 2
    """Batches that may wait."""
    num_samples: int = 0
    """How far ahead of a batch its shards are fetched, in samples of the order; 0 is not at all."""


_READ_AHEAD = ReadAhead()


class BatchReader:
    """One rank's part of the global batches of a shard set.

    Args:
        shard_set: the set.
        order: of the set's samples.
        images: where pixels come from.
        rank, world_size: whose part.
        on_error: "fail" raises the first `DamagedSample`; "skip" leaves it out of the batch.
        ahead: what is read before a batch is asked for.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        order: Order,
        images: ImageReader,
        *,
        rank: int,
        world_size: int,
        on_error: Literal["fail", "skip"] = "fail",
        ahead: ReadAhead = _READ_AHEAD,
    ) -> None:
        if world_size > shard_set.num_streams:
            raise ConfigError(
                f"{shard_set.location} has {shard_set.num_streams} streams, which is too few for "
                f"{world_size} workers; build it with --num-shards {world_size} or more"
            )
        self.order = order
        self.images = images
        self._labels = shard_set.samples["label"]
        self.rank = rank
        self.world_size = world_size
        self.on_error = on_error
        self.ahead = ahead

    def batches(self, position: int, batch_size: int) -> Generator[Batch]:
        """The endless sequence of this rank's batches, from a global position on.

        At most `ahead.num_batches` wait. What goes wrong with a batch is raised when it is due, so
        every batch before it is used and the run stops at the same place however far ahead the
        threads are. Closing the generator ends them; one that is fetching shards ends after that.
        """
        pool = ThreadPoolExecutor(self.ahead.num_threads, thread_name_prefix="reader")
        # A thread of its own: fetching whole shards takes long, and must not hold up the batches
        # whose shards are there already.
        prefetcher = ThreadPoolExecutor(1, thread_name_prefix="prefetcher")
        prefetching: Future[None] | None = None
        # What gives each batch, or raises what went wrong with it, in the order of their positions.
        waiting: deque[Callable[[], Batch]] = deque()
        try:
            while True:
                # One more than may wait, since the first of them is handed out below.
                while len(waiting) <= self.ahead.num_batches:
                    start = position + len(waiting) * batch_size
                    slots = self._slots(start, batch_size)
                    # While one is running, others are left out and not queued: it may be slower
                    # than training, and then only what comes next is worth fetching. Its errors are
                    # not looked at; a batch that needs what could not be fetched raises them by
                    # itself.
                    if self.ahead.num_samples and (prefetching is None or prefetching.done()):
                        coming = self._slots(start + self.ahead.num_samples, batch_size)
                        prefetching = prefetcher.submit(self.images.prefetch, coming.samples)
                    if self.images.is_cached(slots.samples):
                        waiting.append(partial(self._batch, start, slots))
                    else:
                        waiting.append(pool.submit(self._batch, start, slots).result)
                position += batch_size
                yield waiting.popleft()()
        finally:
            # Not waited for: fetching whole shards may take minutes.
            prefetcher.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(cancel_futures=True)

    def read(self, position: int, batch_size: int) -> Batch:
        """This rank's part of the global batch that starts at `position`."""
        return self._batch(position, self._slots(position, batch_size))

    def close(self) -> None:
        """Read no more, and do not wait for shards that are being fetched."""
        self.images.close()

    def _slots(self, position: int, batch_size: int) -> BatchIndices:
        return self.order.local_batch(
            position, batch_size, rank=self.rank, world_size=self.world_size
        )

    def _batch(self, position: int, slots: BatchIndices) -> Batch:
        images = self.images.read(slots.samples)
        if images.damaged:
            if self.on_error == "fail":
                raise images.damaged[0]
            slots = slots[images.valid]
        labels = self._labels[slots.samples]
        return Batch(
            images.stored,
            torch.from_numpy(labels.astype(np.int64)),
            torch.from_numpy(slots.positions - position),
            images.damaged,
        )
