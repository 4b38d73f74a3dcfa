"""Which sample comes at which position: a pure function of (seed, position).

A shard set has S canonical streams, fixed when it is written. In each epoch every stream gets whole
shards in a shuffled order and a shuffle inside windows, and the global order takes samples from the
streams in turn; a stream that is used up drops out. Nothing here depends on the number of workers:
rank r of W reads the streams s with s % W == r, so any W sees the same global batches, and resuming
needs one integer. Everything can be computed at any position without walking there, so skipping
costs nothing.

The trade: the shuffle is as good as `window` (and the shards' own content) allow; a window that
covers a stream's whole epoch is a full shuffle of that stream. Permutations come from a counter
based hash (SplitMix64: Steele, Lea and Flood, 2014), not from a library's generator, whose output
may change between versions. numpy only: no torch, no I/O.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["Order", "Slot", "keyed_permutation"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_permutation(n: int, *key: int | str) -> list[int]:
    """A permutation of range(n) decided by `key` alone, the same on every platform and version."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    state = np.uint64(int.from_bytes(digest[:8], "little"))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        x = state + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    order: list[int] = np.argsort(x, kind="stable").tolist()
    return order


@dataclass(frozen=True)
class Slot:
    """One place in the global order and the sample that stands there."""

    position: int
    """Real samples consumed globally before this one."""
    stream: int
    shard: int
    sample: int
    """Index of the sample within its shard."""


class Order:
    """The global order of one shard set.

    Args:
        shard_sizes: samples in each shard.
        num_streams: S; at most the number of shards.
        window: samples of a stream that are shuffled together.
        seed: decides everything else.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, num_streams: int, window: int, seed: int
    ) -> None:
        if not 1 <= num_streams <= len(shard_sizes):
            raise ValueError(f"{num_streams} streams need as many shards, got {len(shard_sizes)}")
        if min(shard_sizes) < 1 or window < 1:
            raise ValueError("every shard needs a sample and the window must be at least 1")
        self.shard_sizes = tuple(shard_sizes)
        self.num_streams = num_streams
        self.window = window
        self.seed = seed
        self.epoch_size = sum(shard_sizes)
        self._epoch_plan = lru_cache(maxsize=2)(self._plan)
        self._window_permutation = lru_cache(maxsize=2 * num_streams)(self._shuffle_window)

    def slot(self, position: int) -> Slot:
        """The sample at a global position (>= 0)."""
        epoch, offset = divmod(position, self.epoch_size)
        plan = self._epoch_plan(epoch)
        stream, index = plan.locate(offset)
        block, within = divmod(index, self.window)
        length = min(self.window, plan.lengths[stream] - block * self.window)
        shuffled = self._window_permutation(epoch, stream, block, length)[within]
        shard, sample = plan.sample_of(stream, block * self.window + shuffled)
        return Slot(position, stream, shard, sample)

    def batch(self, position: int, batch_size: int) -> list[Slot]:
        """The global batch that starts at `position`, in order."""
        return [self.slot(p) for p in range(position, position + batch_size)]

    def local_batch(
        self, position: int, batch_size: int, *, rank: int, world_size: int
    ) -> list[Slot]:
        """The part of the global batch that a rank reads: the streams with s % W == rank.

        May be shorter than batch_size / W, or empty at the end of an epoch of unequal shards; the
        caller weights by the count.
        """
        slots = self.batch(position, batch_size)
        return [slot for slot in slots if slot.stream % world_size == rank]

    def _plan(self, epoch: int) -> _EpochPlan:
        shards = keyed_permutation(len(self.shard_sizes), self.seed, epoch, "shards")
        streams = [shards[s :: self.num_streams] for s in range(self.num_streams)]
        return _EpochPlan(streams, self.shard_sizes)

    def _shuffle_window(self, epoch: int, stream: int, block: int, length: int) -> list[int]:
        return keyed_permutation(length, self.seed, epoch, stream, block)


class _EpochPlan:
    """Which shards each stream reads in one epoch, and where an offset of the epoch falls."""

    def __init__(self, streams: list[list[int]], shard_sizes: Sequence[int]) -> None:
        self.streams = streams
        self.starts = [list(_running_totals(shard_sizes[i] for i in ids)) for ids in streams]
        self.lengths = [starts.pop() for starts in self.starts]
        # Between two stream lengths the set of streams that still take turns stays the same.
        self._rounds = [0, *sorted(set(self.lengths))]
        self._offsets = [sum(min(n, r) for n in self.lengths) for r in self._rounds]
        self._active = [[s for s, n in enumerate(self.lengths) if n > r] for r in self._rounds]

    def locate(self, offset: int) -> tuple[int, int]:
        """(stream, index within the stream) at an offset of the epoch."""
        part = bisect_right(self._offsets, offset) - 1
        active = self._active[part]
        turn, place = divmod(offset - self._offsets[part], len(active))
        return active[place], self._rounds[part] + turn

    def sample_of(self, stream: int, index: int) -> tuple[int, int]:
        """(shard, sample within it) of a stream's unshuffled index."""
        place = bisect_right(self.starts[stream], index) - 1
        return self.streams[stream][place], index - self.starts[stream][place]


def _running_totals(sizes: Iterator[int]) -> Iterator[int]:
    total = 0
    yield 0
    for size in sizes:
        total += size
        yield total
