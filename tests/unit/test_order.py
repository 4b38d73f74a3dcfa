"""The order of samples is a pure function of (seed, position), whatever the number of workers."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ganscale.data.order import BatchIndices, Order, keyed_permutation

property_test = settings(
    deadline=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


@dataclass(frozen=True)
class Layout:
    """The arguments of an order."""

    sizes: tuple[int, ...]
    num_streams: int
    window: int
    seed: int

    def order(self) -> Order:
        return Order(self.sizes, num_streams=self.num_streams, window=self.window, seed=self.seed)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    return Layout(
        sizes=tuple(sizes),
        num_streams=draw(st.integers(1, len(sizes))),
        window=draw(st.sampled_from((1, 2, 3, 5, 8, 13, 1000))),
        seed=draw(st.integers(0, 2**63)),
    )


def samples_of_shard(layout: Layout, shard: int) -> range:
    start = sum(layout.sizes[:shard])
    return range(start, start + layout.sizes[shard])


def naive_streams(layout: Layout, epoch: int) -> list[list[int]]:
    """Each stream's samples in the order they are read."""
    shards = keyed_permutation(len(layout.sizes), layout.seed, epoch, "shards")
    streams = []
    for stream in range(layout.num_streams):
        samples = [
            sample
            for turn, shard in enumerate(shards)
            if turn % layout.num_streams == stream
            for sample in samples_of_shard(layout, shard)
        ]
        shuffled = []
        block = 0
        while samples:
            window, samples = samples[: layout.window], samples[layout.window :]
            order = keyed_permutation(len(window), layout.seed, epoch, stream, block)
            shuffled += [window[i] for i in order]
            block += 1
        streams.append(shuffled)
    return streams


def naive_epoch(layout: Layout, epoch: int) -> list[tuple[int, int]]:
    """(stream, sample) of a whole epoch: one from each stream in turn, until all are dry."""
    streams = naive_streams(layout, epoch)
    taken = []
    while any(streams):
        for number, stream in enumerate(streams):
            if stream:
                taken.append((number, stream.pop(0)))
    return taken


def as_tuples(slots: BatchIndices) -> list[tuple[int, int, int]]:
    """(position, stream, sample) of each."""
    columns = (slots.positions, slots.streams, slots.samples)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@property_test
@given(layout=layouts(), epoch=st.integers(0, 50))
def test_an_epoch_is_the_naive_round_robin(layout: Layout, epoch: int) -> None:
    size = sum(layout.sizes)
    slots = layout.order().batch(epoch * size, size)
    expected = [(epoch * size + i, *taken) for i, taken in enumerate(naive_epoch(layout, epoch))]
    assert as_tuples(slots) == expected


@property_test
@given(layout=layouts(), position=st.integers(0, 10**6), batch_size=st.integers(1, 40))
def test_every_world_size_reads_the_same_global_batch(
    layout: Layout, position: int, batch_size: int
) -> None:
    order = layout.order()
    expected = order.batch(position, batch_size)
    for world_size in range(1, 9):
        parts = [
            order.local_batch(position, batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert sorted(slot for part in parts for slot in as_tuples(part)) == as_tuples(expected)
        for part in parts:
            assert as_tuples(part) == sorted(as_tuples(part))


@property_test
@given(layout=layouts(), world_size=st.integers(1, 8))
def test_a_rank_keeps_its_own_streams(layout: Layout, world_size: int) -> None:
    order = layout.order()
    owners: dict[int, set[int]] = {}
    for rank in range(world_size):
        part = order.local_batch(0, order.epoch_size, rank=rank, world_size=world_size)
        for stream in part.streams.tolist():
            owners.setdefault(stream, set()).add(rank)
    assert set(owners) == set(range(layout.num_streams))
    assert all(len(ranks) == 1 for ranks in owners.values())


@property_test
@given(layout=layouts(), epoch=st.integers(0, 10**9))
def test_an_epoch_has_each_sample_exactly_once(layout: Layout, epoch: int) -> None:
    size = sum(layout.sizes)
    slots = layout.order().batch(epoch * size, size)
    assert sorted(slots.samples.tolist()) == list(range(size))


@property_test
@given(
    layout=layouts(),
    batch_size=st.integers(1, 16),
    num_steps=st.integers(1, 6),
    resume_at=st.integers(0, 5),
    before=st.integers(1, 8),
    after=st.integers(1, 8),
)
def test_a_run_resumed_at_another_world_size_sees_the_same_samples(
    layout: Layout, batch_size: int, num_steps: int, resume_at: int, before: int, after: int
) -> None:
    whole = layout.order().batch(0, num_steps * batch_size)
    seen: list[tuple[int, int, int]] = []
    order = layout.order()
    for step in range(num_steps):
        if step == resume_at:
            order = layout.order()
        world_size = before if step < resume_at else after
        for rank in range(world_size):
            start = step * batch_size
            part = order.local_batch(start, batch_size, rank=rank, world_size=world_size)
            seen += as_tuples(part)
    assert sorted(seen) == as_tuples(whole)


@property_test
@given(
    layout=layouts(),
    positions=st.lists(st.integers(0, 5000), min_size=1, max_size=30),
    batch_size=st.integers(1, 200),
)
def test_a_batch_does_not_depend_on_what_was_asked_before(
    layout: Layout, positions: list[int], batch_size: int
) -> None:
    order = layout.order()
    for position in positions:
        fresh = layout.order().batch(position, batch_size)
        assert as_tuples(order.batch(position, batch_size)) == as_tuples(fresh)


def reads_of_each_stream(order: Order, epoch: int) -> list[list[int]]:
    """The samples of every stream in the order one epoch reads them."""
    reads: list[list[int]] = [[] for _ in range(order.num_streams)]
    for _, stream, sample in as_tuples(order.batch(epoch * order.epoch_size, order.epoch_size)):
        reads[stream].append(sample)
    return reads


@property_test
@given(layout=layouts(), epoch=st.integers(0, 1000))
def test_a_sample_never_leaves_its_window(layout: Layout, epoch: int) -> None:
    straight = Order(layout.sizes, num_streams=layout.num_streams, window=1, seed=layout.seed)
    shuffled = reads_of_each_stream(layout.order(), epoch)
    for read, forward in zip(shuffled, reads_of_each_stream(straight, epoch), strict=True):
        for start in range(0, len(forward), layout.window):
            end = start + layout.window
            assert sorted(read[start:end]) == sorted(forward[start:end])


@property_test
@given(layout=layouts(), epoch=st.integers(0, 1000))
def test_window_one_reads_every_shard_straight_through(layout: Layout, epoch: int) -> None:
    order = Order(layout.sizes, num_streams=layout.num_streams, window=1, seed=layout.seed)
    for read in reads_of_each_stream(order, epoch):
        owners = [i for i, length in enumerate(layout.sizes) for _ in range(length)]
        shards = list(dict.fromkeys(owners[sample] for sample in read))
        assert read == [k for shard in shards for k in samples_of_shard(layout, shard)]


@property_test
@given(layout=layouts(), extra=st.integers(0, 10**9))
def test_a_window_longer_than_the_stream_is_as_one_of_its_length(
    layout: Layout, extra: int
) -> None:
    longest = sum(layout.sizes)
    exact = Order(layout.sizes, num_streams=layout.num_streams, window=longest, seed=layout.seed)
    longer = Order(
        layout.sizes, num_streams=layout.num_streams, window=longest + extra, seed=layout.seed
    )
    assert as_tuples(exact.batch(0, 2 * longest)) == as_tuples(longer.batch(0, 2 * longest))


@property_test
@given(seed=st.integers(0, 2**63), num_streams=st.integers(1, 8), epoch=st.integers(0, 1000))
def test_epochs_and_seeds_differ_in_order(seed: int, num_streams: int, epoch: int) -> None:
    sizes = (9, 8, 9, 7, 8, 9, 8, 8)

    def samples(seed: int, epoch: int) -> list[int]:
        order = Order(sizes, num_streams=num_streams, window=16, seed=seed)
        slots = order.batch(epoch * order.epoch_size, order.epoch_size)
        in_order: list[int] = slots.samples.tolist()
        return in_order

    assert samples(seed, epoch) != samples(seed, epoch + 1)
    assert samples(seed, epoch) != samples(seed + 1, epoch)


def test_a_used_up_stream_drops_out_and_the_others_go_on_in_turn() -> None:
    order = Order((1, 4, 2), num_streams=3, window=1, seed=0)
    turns = order.batch(0, 7).streams.tolist()
    lengths = Counter(turns)
    expected = [s for turn in range(4) for s in range(3) if turn < lengths[s]]
    assert sorted(lengths.values()) == [1, 2, 4]
    assert turns == expected


@property_test
@given(n=st.integers(0, 300), key=st.tuples(st.integers(), st.text(max_size=5)))
def test_keyed_permutation_sorts_by_splitmix64(n: int, key: tuple[int, str]) -> None:
    mask = 2**64 - 1
    state = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    hashes = []
    for i in range(1, n + 1):
        x = (state + 0x9E3779B97F4A7C15 * i) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        hashes.append(x ^ (x >> 31))
    assert keyed_permutation(n, *key).tolist() == sorted(range(n), key=hashes.__getitem__)


@pytest.mark.parametrize("window", [1, 8, 64, 500, 2000])
@pytest.mark.parametrize("num_streams", [1, 4, 20])
def test_mixing_is_the_measured_distance_of_neighbours(window: int, num_streams: int) -> None:
    sizes = [1000] * 20
    order = Order(sizes, num_streams=num_streams, window=window, seed=0)
    distances = []
    for epoch in range(3):
        samples = order.batch(epoch * order.epoch_size, order.epoch_size).samples
        position = np.argsort(samples).reshape(len(sizes), -1)  # (shard, sample)
        distances.append(np.abs(np.diff(position, axis=1)).mean())
    uniform = (order.epoch_size + 1) / 3
    assert float(np.mean(distances)) / uniform == pytest.approx(order.mixing, rel=0.06)


def test_the_permutation_of_a_key_is_pinned() -> None:
    assert keyed_permutation(12, 4711, 3, "shards").tolist() == [
        5,
        0,
        2,
        6,
        10,
        11,
        3,
        9,
        4,
        8,
        1,
        7,
    ]


@pytest.mark.parametrize(
    ("sizes", "num_streams", "window"),
    [((3, 3), 3, 1), ((3, 3), 0, 1), ((3, 0), 1, 1), ((3, 3), 1, 0), ((), 1, 1)],
)
def test_impossible_layouts_are_refused(
    sizes: tuple[int, ...], num_streams: int, window: int
) -> None:
    with pytest.raises(ValueError, match=r"streams need|must be at least 1"):
        Order(sizes, num_streams=num_streams, window=window, seed=0)
