"""Which sample comes at which position: a pure function of (seed, position).

A shard set has S canonical streams, fixed when it is written. In each epoch every stream gets whole
shards in a shuffled order and a shuffle inside windows, and the global order takes samples from the
streams in turn; a stream that is used up drops out. Nothing here depends on the number of workers:
rank r of W reads the streams s with s % W == r, so any W sees the same global batches, and resuming
needs one integer. An epoch ends where its last sample was taken, and a batch may span two epochs:
no batch is short and no sample is left out.

A stream goes through its shards strictly forward, window by window. So a rank needs few shards at
any time, and which ones come next is known: they can be fetched ahead, and a shard that has been
left is not needed again in the epoch. A full shuffle would touch every shard in every batch.

The order is computed a block at a time, one window of every stream, so any position is reached
without walking there. The shuffle is as good as `window` (and the shards' own content) allow; a
window that covers a stream's whole epoch is a full shuffle of that stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of range(n) decided by `key` alone, the same on every platform and version.

    The key's integers must be Python's own, as the `repr` of numpy's changed with numpy 2.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    state = np.uint64(int.from_bytes(digest[:8], "little"))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        x = state + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    # SplitMix64 (Steele, Lea and Flood, 2014), as the output of a library's generator may change
    # between versions. Sorting hashed counters needs neither a loop nor a generator's state. The
    # hash is a bijection of 64-bit integers, so no two are equal and any sorting algorithm gives
    # the same permutation.
    return np.argsort(x, kind="stable")


@dataclass(frozen=True)
class BatchIndices:
    """The samples of a batch and their positions in the global order, which ascend."""

    positions: NDArray[np.int64]
    """(n,) real samples consumed globally before this one."""
    streams: NDArray[np.int64]
    """(n,) stream that the sample comes from."""
    samples: NDArray[np.int64]
    """(n,) sample of the set: those of shard 0, then those of shard 1, ..."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> BatchIndices:
        return BatchIndices(self.positions[chosen], self.streams[chosen], self.samples[chosen])


class Order:
    """The global order of one shard set.

    Args:
        shard_sizes: samples in each shard.
        num_streams: S; at most the number of shards.
        window: samples of a stream that are shuffled together.
        seed: decides everything else.
    """

    def __init__(self, shard_sizes: ArrayLike, *, num_streams: int, window: int, seed: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        if not 1 <= num_streams <= len(self.shard_sizes):
            raise ValueError(
                f"{num_streams} streams need as many shards, got {len(self.shard_sizes)}"
            )
        if self.shard_sizes.min() < 1 or window < 1:
            raise ValueError("every shard needs a sample and the window must be at least 1")
        self.num_streams = num_streams
        self.window = window
        self.seed = seed
        self.epoch_size = int(self.shard_sizes.sum())
        self._shard_starts = _starts(self.shard_sizes)
        # Caches of this object, not of its class, so that they go with it. Two plans, as a batch
        # may span two epochs; three blocks, as a batch may span two and reading ahead is in a
        # third.
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._block = lru_cache(maxsize=3)(self._make_block)

    def batch(self, position: int, batch_size: int) -> BatchIndices:
        """The global batch that starts at `position`, in order."""
        streams, samples = [], []
        at, missing = position, batch_size
        while missing:  # once for almost all batches; more often where blocks or epochs end
            epoch, offset = divmod(at, self.epoch_size)
            block_starts = self._plan(epoch).block_starts
            number = int(np.searchsorted(block_starts, offset, side="right")) - 1
            block = self._block(epoch, number)
            part = slice(offset - block_starts[number], offset - block_starts[number] + missing)
            streams.append(block.streams[part])
            samples.append(block.samples[part])
            at += len(samples[-1])
            missing -= len(samples[-1])
        positions = np.arange(position, position + batch_size)
        return BatchIndices(positions, _joined(streams), _joined(samples))

    def local_batch(
        self, position: int, batch_size: int, *, rank: int, world_size: int
    ) -> BatchIndices:
        """The part of the global batch that a rank reads: the streams with s % W == rank.

        May be shorter than batch_size / W, or empty at the end of an epoch of unequal shards. The
        caller weights its loss by the count.
        """
        # Every rank computes the whole batch, which takes microseconds, and keeps its part. So
        # there is one definition of the order, and no rank depends on what another has computed.
        slots = self.batch(position, batch_size)
        return slots[slots.streams % world_size == rank]

    @property
    def mixing(self) -> float:
        """How far apart neighbours of a shard end up, against a shuffle of the whole set (1.0).

        Two neighbours in one window of w samples are (w + 1) / 3 turns apart on average, and one
        pair in w lies in adjacent windows, w turns apart; uniformly shuffled, any two of N samples
        are (N + 1) / 3 positions apart.
        """
        length = self.epoch_size // self.num_streams
        whole, rest = divmod(length, self.window)
        windows = [(whole * self.window, self.window), (rest, rest)]
        turns = sum(n * ((w - 1 / w) / 3 + 1) for n, w in windows if n) / length
        return min(1.0, 3 * self.num_streams * turns / (self.epoch_size + 1))

    def _make_plan(self, epoch: int) -> _EpochPlan:
        # Dealt anew in each epoch, so that other shards meet in a stream. Whole shards, so that
        # within an epoch no two ranks read the same one.
        shards = keyed_permutation(len(self.shard_sizes), self.seed, epoch, "shards")
        streams = [shards[s :: self.num_streams] for s in range(self.num_streams)]
        lengths = np.array([self.shard_sizes[ids].sum() for ids in streams])
        # A window larger than the longest stream makes one block, however large it is.
        height = min(self.window, int(lengths.max()))
        ends = np.arange(0, lengths.max() + height, height)
        block_starts = np.minimum(lengths, ends[:, None]).sum(axis=1)
        return _EpochPlan(streams, lengths, block_starts)

    def _make_block(self, epoch: int, number: int) -> _Block:
        plan = self._plan(epoch)
        first = number * self.window
        lengths = np.clip(plan.lengths - first, 0, self.window)
        samples = np.full((lengths.max(), self.num_streams), -1)
        for stream in np.flatnonzero(lengths).tolist():  # Python's integers, for the key
            length = int(lengths[stream])
            shuffled = keyed_permutation(length, self.seed, epoch, stream, number)
            samples[:length, stream] = self._samples_of(plan.streams[stream], first + shuffled)
        # A row is one turn of all streams, and indexing by a mask goes row by row. Streams that are
        # used up have -1 there and drop out, so the turns only become shorter.
        taken = samples >= 0
        return _Block(np.nonzero(taken)[1], samples[taken])

    def _samples_of(
        self, shards: NDArray[np.int64], indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The samples at unshuffled indices of a stream that reads `shards` one after another."""
        starts = _starts(self.shard_sizes[shards])
        place = np.searchsorted(starts, indices, side="right") - 1
        return self._shard_starts[shards[place]] + indices - starts[place]


@dataclass(frozen=True)
class _EpochPlan:
    """Which shards each stream reads in one epoch, and where its blocks begin."""

    streams: Sequence[NDArray[np.int64]]
    lengths: NDArray[np.int64]
    """(S,) samples of each stream."""
    block_starts: NDArray[np.int64]
    """(blocks + 1,) offset in the epoch of each block; the last is the epoch's size."""


@dataclass(frozen=True)
class _Block:
    """One window of every stream, merged in the order of the turns."""

    streams: NDArray[np.int64]
    samples: NDArray[np.int64]


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(sizes) - sizes


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
