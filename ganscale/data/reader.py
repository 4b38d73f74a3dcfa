"""Samples of the global order as batches of tensors, for one rank.

The order says which samples; a ranged read fetches each by its offset in the index, so skipping to
a position reads nothing on the way; webdataset's own pipeline takes the tar bytes apart and decodes
them. A damaged sample is an error that names shard and key, never a shorter batch.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from ganscale.data.order import Order, Slot
from ganscale.data.shards import ShardSet
from ganscale.errors import DataError

__all__ = ["Batch", "ShardReader"]

_END_OF_TAR = bytes(1024)


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch."""

    images: torch.Tensor
    """uint8, (n, C, H, W)"""
    labels: torch.Tensor
    """int64, (n,)"""
    slots: torch.Tensor
    """int64, (n,): which of the global batch's places these are."""


class ShardReader:
    """Reads one rank's part of the global batches of a shard set.

    The next batch is read by one background thread while the current one is used.
    """

    def __init__(self, shard_set: ShardSet, order: Order, *, rank: int, world_size: int) -> None:
        if world_size > shard_set.num_streams:
            raise DataError(
                f"{shard_set.root} has {shard_set.num_streams} streams, which is too few for "
                f"{world_size} workers; build it with --num-shards {world_size} or more"
            )
        self.shard_set = shard_set
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self._descriptor = lru_cache(maxsize=None)(self._open)

    def batches(self, position: int, batch_size: int) -> Generator[Batch]:
        """The endless sequence of this rank's batches, from a global position on."""
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
            ahead = pool.submit(self.read, position, batch_size)
            while True:
                batch = ahead.result()
                position += batch_size
                ahead = pool.submit(self.read, position, batch_size)
                yield batch

    def read(self, position: int, batch_size: int) -> Batch:
        """This rank's part of the global batch that starts at `position`."""
        slots = self.order.local_batch(
            position, batch_size, rank=self.rank, world_size=self.world_size
        )
        pipeline = wds.DataPipeline(
            lambda: self._spans(slots), wds.tariterators.tar_file_expander, _group, _decode
        )
        images = np.empty((len(slots), *self.shard_set.image_shape), dtype=np.uint8)
        labels = np.empty(len(slots), dtype=np.int64)
        count = 0
        for pixels, label in self._checked(pipeline):
            images[count], labels[count] = pixels, label
            count += 1
        if count != len(slots):
            raise DataError(f"{self.shard_set.root}: {count} of {len(slots)} samples came")
        places = torch.tensor([slot.position - position for slot in slots], dtype=torch.int64)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), places)

    def _spans(self, slots: list[Slot]) -> Iterator[dict[str, Any]]:
        """webdataset's open streams: each sample's bytes, made a tar of its own."""
        for slot in slots:
            shard = self.shard_set.shards[slot.shard]
            offset, length = shard.offsets[slot.sample], shard.lengths[slot.sample]
            data = os.pread(self._descriptor(shard.name), length, offset)
            path = self.shard_set.root / shard.name
            if len(data) != length:
                raise DataError(
                    f"{path} is truncated: sample {slot.sample} ends at byte {offset + length}. "
                    "Run: ganscale shards verify"
                )
            if zlib.crc32(data) != shard.crc32s[slot.sample]:
                raise DataError(
                    f"{path}: sample {slot.sample} at byte {offset} is damaged (its CRC-32 differs "
                    "from the index). Run: ganscale shards verify"
                )
            yield {"url": f"{path}, sample {slot.sample}", "stream": io.BytesIO(data + _END_OF_TAR)}

    def _open(self, name: str) -> int:
        try:
            return os.open(self.shard_set.root / name, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"shard {self.shard_set.root / name} cannot be opened: {error.strerror}"
            ) from None

    def _checked(self, pipeline: Iterable[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        try:
            yield from pipeline
        except DataError:
            raise
        except Exception as error:  # webdataset passes on whatever tarfile and PIL raise
            raise DataError(
                f"{self.shard_set.root}: a sample cannot be read: "
                f"{type(error).__name__}: {error}. Run: ganscale shards verify"
            ) from error


def _group(files: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return iter(wds.tariterators.group_by_keys(files))


def _decode(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    for sample in samples:
        try:
            with Image.open(io.BytesIO(sample["png"])) as image:
                pixels = np.asarray(image, dtype=np.uint8)
            label = int(sample["cls"])
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{sample['__url__']} (key {sample['__key__']}) is damaged: {error!r}. "
                "Run: ganscale shards verify"
            ) from None
        chw = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        yield chw, label
