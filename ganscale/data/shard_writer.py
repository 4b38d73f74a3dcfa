"""One shard: its images written to a tar, or read from one, and what is then known of them.

A shard is built by one process from nothing but its recipe and the numbers of its images, so it has
the same bytes whichever process builds it, and whether or not the build was interrupted. What is
known of a finished shard is recorded beside it; a build that goes on takes it from there.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import webdataset as wds

from ganscale.atomic_files import replacing
from ganscale.data.channel_stats import ChannelStats
from ganscale.data.encodings import ENCODINGS, NPY, PNG, Encoding
from ganscale.data.images import Fit, Normalised
from ganscale.data.shards import SAMPLE_DTYPE, Samples, Shard
from ganscale.data.sources import Source, SourceSpec, open_source
from ganscale.data.tally import Tally
from ganscale.data.tars import BLOCK_BYTES, scan_tar
from ganscale.errors import DataError

MAKE_ALIKE = "To make them alike: ganscale shards build --resolution N --img-channels C"


@dataclass(frozen=True)
class Recipe:
    """What is done to a source's image before it is stored in the shard."""

    spec: SourceSpec
    resolution: int | None
    img_channels: int | None
    background: str
    fit: Fit
    fingerprint: str
    """Of the source's content."""

    def normalised(self, data: bytes, encoding: Encoding) -> Normalised:
        return encoding.normalised(
            data,
            resolution=self.resolution,
            img_channels=self.img_channels,
            background=self.background,
            fit=self.fit,
        )


@dataclass(frozen=True)
class BuiltShard:
    """A shard that has been written or read, and what the index needs to know of it."""

    shard: Shard
    samples: Samples
    image_shape: tuple[int, int, int]
    encoding: Encoding
    stats: ChannelStats
    example: str
    """Names an image of the shard, for errors."""
    changes: Tally
    """What was converted or left out."""

    def save(self, path: Path) -> None:
        text = json.dumps(
            {
                "shard": asdict(self.shard),
                "image_shape": self.image_shape,
                "dtype": self.encoding.dtype.name,
                "example": self.example,
                "changes": dict(self.changes.items()),
            }
        )
        # Durable and whole or not there, as it is what says that the shard need not be built again.
        with replacing(path) as file:
            np.savez(file, samples=self.samples, text=text, **vars(self.stats))

    @classmethod
    def load(cls, path: Path) -> BuiltShard:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            stats = {field.name: arrays[field.name] for field in fields(ChannelStats)}
            text = json.loads(str(arrays["text"]))
            channels, height, width = text["image_shape"]
            return cls(
                shard=Shard(**text["shard"]),
                samples=arrays["samples"],
                image_shape=(channels, height, width),
                encoding=ENCODINGS[text["dtype"]],
                stats=ChannelStats(**stats),
                example=text["example"],
                changes=Tally(text["changes"]),
            )


def build_shard(
    recipe: Recipe, folder: Path, number: int, ids: tuple[int, ...], part: Source | None = None
) -> BuiltShard:
    """Write shard `number` with the images `ids` of the source, unless an earlier build has.

    They are read from `part` where `Source.part` has made one. Raises `DataError` that names the
    image that cannot be used.
    """
    path = folder / f"shard-{number:05d}.tar"
    record = folder / f".{path.name}.npz"
    if record.exists():
        # A record that cannot be read is as good as none: the shard is built again.
        with suppress(EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return BuiltShard.load(record)
    # Without a part the source is opened in this process by its spec: file handles and data sets of
    # torchvision do not travel between processes, or would be copied for every shard.
    source = _opened(recipe.spec, recipe.fingerprint) if part is None else part
    summary = _Summary()
    # No time and no user of this machine, so that the same images give the same bytes.
    form = {"user": "ganscale", "group": "ganscale", "mtime": 0.0, "encoder": False}
    with replacing(path) as file, wds.TarWriter(file, **form) as writer:
        for index in ids:
            name, label = source.name(index), source.label(index)
            data = source.read(index)
            with _named(name):
                normalised = recipe.normalised(data, source.encoding)
                summary.add(normalised, source.encoding, name)
            fields = {} if label < 0 else {"cls": str(label).encode()}
            fields[source.encoding.suffix] = normalised.data
            writer.write({"__key__": f"{index:06d}", **fields})
    # Offsets and CRCs are those of the file as it is on the disk, not as it was meant to be: an
    # error in writing it shows here and not in training.
    rows = np.array([sample.row for sample in scan_tar(path)], dtype=SAMPLE_DTYPE)
    built = summary.shard(path, rows)
    built.save(record)
    return built


def read_shard(path: Path) -> BuiltShard:
    """Decode every image of a tar that is there already.

    Raises `DataError` that names the tar and the key of an image that cannot be used.
    """
    summary = _Summary()
    samples = list(scan_tar(path, summary.changes))
    with path.open("rb") as file:
        for sample in samples:
            file.seek(BLOCK_BYTES * sample.block)
            name, encoding = f"{path}: sample {sample.key}", NPY if sample.is_array else PNG
            with _named(name):
                summary.add(encoding.normalised(file.read(sample.num_bytes)), encoding, name)
    return summary.shard(path, np.array([s.row for s in samples], dtype=SAMPLE_DTYPE))


class _Summary:
    """What the images so far have in common, and their statistics; refuses one that differs."""

    def __init__(self) -> None:
        self.shape: tuple[int, int, int] | None = None
        self.encoding = PNG
        self.stats: ChannelStats | None = None
        self.example = ""
        self.changes = Tally()

    def add(self, normalised: Normalised, encoding: Encoding, image: str) -> None:
        values = normalised.values
        for change in normalised.changes:
            self.changes.add(change, image)
        channels, height, width = shape = values.shape
        if self.shape is None:
            # As the networks double and halve the resolution. Asked of the first image, before
            # thousands of others are converted.
            if height != width or height & (height - 1):
                raise DataError(
                    f"is {width}x{height}; expected square images, a power of two. "
                    "To resize and crop: ganscale shards build --resolution 32 (or --fit pad)"
                )
            self.shape, self.encoding = (channels, height, width), encoding
            self.example = image
        if encoding != self.encoding:
            raise DataError(f"is an {encoding.noun}, {self.example} an {self.encoding.noun}")
        if shape != self.shape:
            raise DataError(
                f"has (channels, height, width) {shape}, others have {self.shape}, such as "
                f"{self.example}. {MAKE_ALIKE}"
            )
        stats = ChannelStats.of(values)
        self.stats = stats if self.stats is None else self.stats + stats

    def shard(self, path: Path, samples: Samples) -> BuiltShard:
        if self.shape is None or self.stats is None:
            raise DataError(f"{path} holds no samples")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard = Shard(path.name, path.stat().st_size, sha256, len(samples))
        return BuiltShard(
            shard, samples, self.shape, self.encoding, self.stats, self.example, self.changes
        )


@functools.lru_cache(maxsize=1)
def _opened(spec: SourceSpec, fingerprint: str) -> Source:
    """The source, listed once for all shards that a process builds of one content of it."""
    source = open_source(spec)
    if source.fingerprint != fingerprint:
        raise DataError(f"{spec} was changed while shards were built from it: build again")
    return source


@contextmanager
def _named(image: str) -> Iterator[None]:
    """Put the image's name before the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{image} {error}") from None
