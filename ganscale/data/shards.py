"""Shard sets: plain WebDataset tars and the index.json that makes them seekable and checkable.

A set counts as finished when its index is there, which is written last. Building is deterministic:
the samples are dealt to the shards by a fixed permutation, tar headers carry no time or user, and
the same input gives the same bytes. Each sample is `key.cls` (label in ASCII) and `key.png`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from ganscale.data.order import keyed_permutation
from ganscale.data.sources import SourceSpec, open_source
from ganscale.errors import ConfigError, DataError

__all__ = ["INDEX_NAME", "Shard", "ShardSet", "build_shards", "check_free", "verify_shards"]

INDEX_NAME = "index.json"
_FORMAT = 1

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Shard:
    """One tar: its name, size, hash, and where in it each sample lies."""

    name: str
    num_bytes: int
    sha256: str
    offsets: tuple[int, ...]
    """Offset of each sample's first tar header."""
    lengths: tuple[int, ...]
    """Bytes from there to the end of the sample's last member, padding included."""
    crc32s: tuple[int, ...]
    """CRC-32 of those bytes: image decoders do not notice every flipped bit."""

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return len(self.offsets)


@dataclass(frozen=True)
class ShardSet:
    """What index.json says about a directory of shards."""

    root: Path
    source: str
    split: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width)"""
    pixel_mean: tuple[float, ...]
    """Mean of each channel over the set, in 0..255."""
    pixel_std: tuple[float, ...]
    num_streams: int
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @classmethod
    def load(cls, root: str | Path) -> ShardSet:
        """Read a finished set's index. Raises `DataError` in one line when it is not one."""
        root = Path(root).expanduser().absolute()
        path = root / INDEX_NAME
        if not root.is_dir():
            raise DataError(f"no such shard directory: {root}. Build it: ganscale shards build")
        if not path.is_file():
            state = "is empty" if not any(root.iterdir()) else f"has no {INDEX_NAME}"
            raise DataError(
                f"{root} {state}: not a finished shard set. Build it: ganscale shards build"
            )
        try:
            return cls._from_json(root, json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({type(error).__name__}: {error}). "
                "Restore it or build the set again: ganscale shards build"
            ) from None

    @classmethod
    def _from_json(cls, root: Path, data: dict[str, Any]) -> ShardSet:
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']}, expected {_FORMAT}")
        shards = tuple(
            Shard(
                name=s["name"],
                num_bytes=s["num_bytes"],
                sha256=s["sha256"],
                offsets=tuple(s["offsets"]),
                lengths=tuple(s["lengths"]),
                crc32s=tuple(s["crc32s"]),
            )
            for s in data["shards"]
        )
        if not shards or not all(
            len(s.offsets) == len(s.lengths) == len(s.crc32s) > 0 for s in shards
        ):
            raise ValueError("a shard without samples, or offsets without lengths")
        if not 1 <= data["num_streams"] <= len(shards):
            raise ValueError(f"{data['num_streams']} streams of {len(shards)} shards")
        channels, height, width = data["image_shape"]
        return cls(
            root=root,
            source=data["source"],
            split=data["split"],
            classes=tuple(data["classes"]),
            image_shape=(channels, height, width),
            pixel_mean=tuple(data["pixel_mean"]),
            pixel_std=tuple(data["pixel_std"]),
            num_streams=data["num_streams"],
            shards=shards,
        )

    def save(self) -> None:
        """Write the index under a temporary name, then rename it: the set is finished."""
        data = {"format": _FORMAT, **asdict(self)}
        del data["root"]
        temporary = self.root / f".{INDEX_NAME}.tmp"
        with temporary.open("w") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.root / INDEX_NAME)


def build_shards(
    spec: SourceSpec,
    out: str | Path,
    *,
    num_shards: int = 64,
    limit: int | None = None,
    progress: Progress = lambda num_samples: None,
) -> ShardSet:
    """Write a source as a shard set, several shards at a time.

    Args:
        spec: from `resolve_source`.
        out: a directory that does not exist yet or is empty; it appears complete or not at all.
        num_shards: tars, and canonical streams of the order.
        limit: use only so many images, evenly taken from the source.
        progress: told how many more samples are written.
    """
    out = check_free(out)
    source = open_source(spec)
    ids = _spread(len(source), limit)
    if not 1 <= num_shards <= len(ids):
        raise ConfigError(f"--num-shards must be in 1..{len(ids)} (the images), got {num_shards}")
    dealt = [ids[i] for i in keyed_permutation(len(ids), "shards")]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        jobs = [(spec, temporary, n, tuple(dealt[n::num_shards])) for n in range(num_shards)]
        results = _run_jobs(jobs, progress)
        shard_set = _summarise(spec, tuple(source.classes), temporary, results)
        shard_set.save()
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ShardSet.load(out)


def check_free(out: str | Path) -> Path:
    """The absolute path of a place where a set can be built; `ConfigError` if it is taken."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out or remove it")
    return out


def verify_shards(shard_set: ShardSet, progress: Progress = lambda num_samples: None) -> list[str]:
    """Compare sizes, hashes and members with the index; one line for each thing that is wrong."""
    problems = []
    for shard in shard_set.shards:
        path = shard_set.root / shard.name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != shard.num_bytes:
            problems.append(f"{path}: {path.stat().st_size} bytes, expected {shard.num_bytes}")
        elif _sha256(path) != shard.sha256:
            problems.append(f"{path}: sha256 differs from the index: the content is damaged")
        elif _sample_spans(path) != (shard.offsets, shard.lengths, shard.crc32s):
            problems.append(f"{path}: the samples do not lie where the index says")
        progress(shard.num_samples)
    return problems


@dataclass(frozen=True)
class _BuiltShard:
    shard: Shard
    image_shape: tuple[int, int, int]
    pixel_sum: tuple[int, ...]
    pixel_square_sum: tuple[int, ...]


def _run_jobs(jobs: list[Any], progress: Progress) -> list[_BuiltShard]:
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_build_shard, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                progress(future.result().shard.num_samples)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _build_shard(spec: SourceSpec, folder: Path, number: int, ids: tuple[int, ...]) -> _BuiltShard:
    source = open_source(spec)
    path = folder / f"shard-{number:05d}.tar"
    shape: tuple[int, int, int] | None = None
    total = square_total = np.zeros(1, dtype=np.int64)
    with path.open("wb") as file:
        with wds.TarWriter(
            file, user="ganscale", group="ganscale", mtime=0.0, encoder=False
        ) as writer:
            for index in ids:
                key, png, label = source.read(index)
                pixels = _decode(png, f"{spec}: image {key}")
                shape = _same_shape(shape, pixels, f"{spec}: image {key}")
                flat = pixels.reshape(-1, shape[0]).astype(np.int64)
                total = total + flat.sum(0)
                square_total = square_total + (flat * flat).sum(0)
                writer.write({"__key__": key, "png": png, "cls": str(label).encode()})
        file.flush()
        os.fsync(file.fileno())
    assert shape is not None
    shard = Shard(path.name, path.stat().st_size, _sha256(path), *_sample_spans(path))
    return _BuiltShard(shard, shape, tuple(total.tolist()), tuple(square_total.tolist()))


def _summarise(
    spec: SourceSpec, classes: tuple[str, ...], root: Path, built: list[_BuiltShard]
) -> ShardSet:
    shapes = {b.image_shape for b in built}
    if len(shapes) > 1:
        raise DataError(f"{spec}: images of different shapes: {sorted(shapes)}")
    shape = shapes.pop()
    num_pixels = sum(b.shard.num_samples for b in built) * shape[1] * shape[2]
    mean = np.sum([b.pixel_sum for b in built], axis=0) / num_pixels
    square_mean = np.sum([b.pixel_square_sum for b in built], axis=0) / num_pixels
    return ShardSet(
        root=root,
        source=spec.kind,
        split=spec.split,
        classes=classes,
        image_shape=shape,
        pixel_mean=tuple(mean.tolist()),
        pixel_std=tuple(np.sqrt(square_mean - mean**2).tolist()),
        num_streams=len(built),
        shards=tuple(b.shard for b in built),
    )


def _sample_spans(path: Path) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Offsets, lengths and CRCs of the samples: runs of members named alike up to the dot."""
    offsets: list[int] = []
    lengths: list[int] = []
    previous = None
    for key, start, end in _members(path):
        if key != previous:
            offsets.append(start)
            lengths.append(0)
            previous = key
        lengths[-1] = end - offsets[-1]
    data = path.read_bytes()
    crc32s = [zlib.crc32(data[at : at + size]) for at, size in zip(offsets, lengths, strict=True)]
    return tuple(offsets), tuple(lengths), tuple(crc32s)


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                blocks = -(-member.size // tarfile.BLOCKSIZE)
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
                yield member.name.partition(".")[0], member.offset, end
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a readable tar: {error}") from None


def _decode(png: bytes, what: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(png)) as image:
            if image.mode not in ("L", "RGB", "RGBA"):
                raise DataError(f"{what} has mode {image.mode}; expected L, RGB or RGBA")
            pixels = np.asarray(image, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{what} cannot be decoded: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _same_shape(
    known: tuple[int, int, int] | None, pixels: np.ndarray[Any, Any], what: str
) -> tuple[int, int, int]:
    height, width, channels = pixels.shape
    shape = (channels, height, width)
    if height != width or height & (height - 1):
        raise DataError(f"{what} is {width}x{height}; expected square images, a power of two")
    if known not in (None, shape):
        raise DataError(f"{what} has shape {shape}, but the first image has {known}")
    return shape


def _spread(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    return [i * count // limit for i in range(limit)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
