"""Shard sets: plain WebDataset tars and the index that makes them seekable and checkable.

`index.json` describes the set and is written last: a set without it is not finished. `samples.npy`
beside it has 16 bytes for each sample: where in its tar the image's bytes lie, their CRC-32 (image
decoders do not notice every flipped bit) and the label. So a million samples are opened by reading
16 MB, and any of them is one ranged read away. The tars themselves hold `key.cls` (the label in
ASCII) and `key.png`. In sets of arrays of floats it is `key.npy`, and the index says which values
are -1 and 1 to the networks.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganscale.atomic_files import write_bytes
from ganscale.data.encodings import ENCODINGS, Encoding
from ganscale.data.tars import BLOCK_BYTES, scan_tar
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import DataError
from ganscale.storage import (
    LocalStore,
    MissingData,
    RetryPolicy,
    Span,
    Store,
    open_store,
    retry,
)

INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
SAMPLE_DTYPE = np.dtype(
    [("block", "<u4"), ("num_bytes", "<u4"), ("crc32", "<u4"), ("label", "<i4")]
)
"""An image's bytes start at 512 * block in its tar; label is -1 where there is none.

Blocks and not bytes: tars align their members, so 32 bits reach 2 TiB into a tar.
"""
_PIXELS_FORMAT, _ARRAYS_FORMAT = 2, 3

Progress = Callable[[int], None]
Samples = NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One tar: its name, size, hash, and how many samples it holds."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, eq=False)
class ShardSet:
    """What the index says about a set of shards, and the store they lie in."""

    store: Store
    source: str
    split: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width)"""
    pixel_mean: tuple[float, ...]
    """Mean of each channel over the set, in the units of its values; of pixels, in 0..255."""
    pixel_std: tuple[float, ...]
    num_streams: int
    shards: tuple[Shard, ...]
    samples: Samples = field(repr=False)
    """(num_samples,) of SAMPLE_DTYPE, those of shard 0 first."""
    values: ValueRange = PIXELS
    """What is stored, and what it is to the networks."""

    @property
    def location(self) -> str:
        """Absolute path or URL of the set."""
        return self.store.location

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return len(self.samples)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def encoding(self) -> Encoding:
        """The form that the images lie in."""
        return ENCODINGS[self.values.dtype]

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """The number of images of each class, by label; empty for a set without labels."""
        labels = self.samples["label"]
        if labels.min() < 0:
            return ()
        return tuple(np.bincount(labels, minlength=len(self.classes)).tolist())

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(shards + 1,) first sample of each shard, and the end."""
        return np.cumsum([0, *(shard.num_samples for shard in self.shards)])

    @cached_property
    def digest(self) -> str:
        """sha256 over the index: sets with equal digests hold equal images."""
        # The index has the hashes of samples.npy and of every shard, so it stands for all bytes of
        # the set without reading them. It is made anew from the values, and says nothing of the
        # place: a copy elsewhere, or an index that was formatted again, is the same set.
        return hashlib.sha256(_to_json(self).encode()).hexdigest()

    def shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the shards that hold some samples."""
        return np.searchsorted(self.starts, samples, side="right") - 1

    def spans(self, samples: NDArray[np.int64]) -> list[Span]:
        """The bytes of some samples' images."""
        rows = self.samples[samples]
        starts = BLOCK_BYTES * rows["block"].astype(np.int64)
        columns = (self.shards_of(samples), starts, rows["num_bytes"])
        return [
            Span(self.shards[shard].name, start, length)
            for shard, start, length in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def describe(self, sample: int) -> str:
        """A sample's place, for errors: URL of the shard, and number and byte within it."""
        (span,) = self.spans(np.array([sample]))
        (shard,) = self.shards_of(np.array([sample]))
        number = sample - int(self.starts[shard])
        return f"{self.location}/{span.name}: sample {number} at byte {span.start}"

    @classmethod
    def load(cls, location: str | Path, policy: RetryPolicy | None = None) -> ShardSet:
        """Read a finished set's index from a path or URL.

        Raises `DataError` in one line when it is not one, or its index is damaged.
        """
        policy = policy or RetryPolicy()
        store = open_store(location, policy)
        if isinstance(store, LocalStore):
            _check_folder(store.root)

        def read(name: str) -> bytes:
            failure = f"{store.location}/{name} could not be read"
            return retry(lambda: store.read(name), policy, failure)

        try:
            text = read(INDEX_NAME)
        except MissingData as error:
            raise DataError(f"{error}: not a finished shard set") from None
        try:
            return cls._parse(store, json.loads(text), read)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{store.location}/{INDEX_NAME} is damaged ({type(error).__name__}: {error}). "
                "Restore it or build the set again: ganscale shards build"
            ) from None

    @classmethod
    def _parse(cls, store: Store, data: dict[str, Any], read: Callable[[str], bytes]) -> ShardSet:
        version, values = data["format"], ValueRange.parse(data.get("values"))
        if version != _format(values):
            raise ValueError(f"format {version}, expected {_format(values)}")
        shards = tuple(Shard(**entry) for entry in data["shards"])
        channels, height, width = data["image_shape"]
        raw = read(SAMPLES_NAME)
        if hashlib.sha256(raw).hexdigest() != data["samples_sha256"]:
            raise ValueError(f"{SAMPLES_NAME} has another sha256")
        samples: Samples = np.load(io.BytesIO(raw), allow_pickle=False)
        shard_set = cls(
            store=store,
            source=data["source"],
            split=data["split"],
            classes=tuple(data["classes"]),
            image_shape=(channels, height, width),
            pixel_mean=tuple(data["pixel_mean"]),
            pixel_std=tuple(data["pixel_std"]),
            num_streams=data["num_streams"],
            shards=shards,
            samples=samples,
            values=values,
        )
        shard_set._check()
        return shard_set

    def _check(self) -> None:
        """Raise `ValueError` if the index contradicts itself.

        All that the order and the reader rely upon, so that a wrong index is an error here and not
        an index error, or a wrong image, in the middle of training.
        """
        if self.samples.dtype != SAMPLE_DTYPE or self.samples.ndim != 1:
            raise ValueError(f"{SAMPLES_NAME} has dtype {self.samples.dtype}")
        if not self.shards or min(shard.num_samples for shard in self.shards) < 1:
            raise ValueError("a shard without samples")
        if self.starts[-1] != len(self.samples):
            raise ValueError(f"{self.starts[-1]} samples in shards, {len(self.samples)} listed")
        if not 1 <= self.num_streams <= len(self.shards):
            raise ValueError(f"{self.num_streams} streams of {len(self.shards)} shards")
        labels = self.samples["label"]
        if labels.max() >= len(self.classes) or len(np.unique(labels < 0)) > 1:
            raise ValueError(
                f"labels up to {labels.max()} of {len(self.classes)} classes, or some missing"
            )
        ends = BLOCK_BYTES * self.samples["block"].astype(np.int64) + self.samples["num_bytes"]
        for number, shard in enumerate(self.shards):
            if ends[self.starts[number] : self.starts[number + 1]].max() > shard.num_bytes:
                raise ValueError(f"a sample of {shard.name} ends after byte {shard.num_bytes}")

    def save(self, folder: Path) -> None:
        """Write samples.npy, then index.json, which makes the set a finished one."""
        write_bytes(folder / SAMPLES_NAME, _to_npy(self.samples))
        write_bytes(folder / INDEX_NAME, _to_json(self).encode())


def verify_shards(shard_set: ShardSet, progress: Progress = lambda num_samples: None) -> list[str]:
    """Compare sizes, hashes and members with the index; one line for each problem."""
    problems = []
    for number, shard in enumerate(shard_set.shards):
        try:
            problems += _problems_of(shard_set, number)
        except DataError as error:
            problems.append(str(error))
        progress(shard.num_samples)
    return problems


def _problems_of(shard_set: ShardSet, number: int) -> list[str]:
    shard = shard_set.shards[number]
    where = f"{shard_set.location}/{shard.name}"
    rows = shard_set.samples[shard_set.starts[number] : shard_set.starts[number + 1]]
    with shard_set.store.local_copy(shard.name, shard.num_bytes) as path:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return [f"{where}: sha256 differs from the index: the content is damaged"]
        # The hash says that the bytes are those that were indexed; scanning them again says that
        # the index is right about where the images lie.
        indexed = [sample.row for sample in scan_tar(path)]
    if not np.array_equal(np.array(indexed, dtype=SAMPLE_DTYPE), rows):
        return [f"{where}: the samples are not those of the index"]
    return []


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"no such shard directory: {root}. Build it: ganscale shards build")
    if not (root / INDEX_NAME).is_file():
        tars = any(root.glob("*.tar"))
        state = f"has no {INDEX_NAME}" if any(root.iterdir()) else "is empty"
        advice = "Index the tars there: ganscale shards index" if tars else "Build it"
        command = "" if tars else ": ganscale shards build"
        raise DataError(f"{root} {state}: not a finished shard set. {advice}{command}")


def _to_json(shard_set: ShardSet) -> str:
    values = shard_set.values.to_json()
    data = {
        "format": _format(shard_set.values),
        "source": shard_set.source,
        "split": shard_set.split,
        "classes": shard_set.classes,
        "image_shape": shard_set.image_shape,
        **({} if values is None else {"values": values}),
        "pixel_mean": shard_set.pixel_mean,
        "pixel_std": shard_set.pixel_std,
        "num_streams": shard_set.num_streams,
        "samples_sha256": hashlib.sha256(_to_npy(shard_set.samples)).hexdigest(),
        "shards": [asdict(shard) for shard in shard_set.shards],
    }
    return json.dumps(data, indent=1)


def _format(values: ValueRange) -> int:
    """Sets of pixels keep the number they had before there were arrays, and their digests with it.

    Sets of arrays have another one, so that versions that know only pixels refuse them.
    """
    return _PIXELS_FORMAT if values == PIXELS else _ARRAYS_FORMAT


def _to_npy(samples: Samples) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, samples, allow_pickle=False)
    return buffer.getvalue()
