"""Writing shard sets, and indexing WebDataset tars that are there already.

Building is deterministic: the samples are dealt to the shards by a fixed permutation, tar headers
carry no time or user, and the same input gives the same bytes. Shards are written by all cores into
a hidden folder beside the target, each renamed when it is durable; an interrupted build goes on
with those it has, and the folder gets its name when the set is complete.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import webdataset as wds
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ganscale.data.images import normalised_png
from ganscale.data.order import keyed_permutation
from ganscale.data.shards import SAMPLE_DTYPE, Progress, Samples, Shard, ShardSet
from ganscale.data.sources import Source, SourceSpec, open_source
from ganscale.data.storage import LocalStore
from ganscale.data.tars import BLOCK_BYTES, scan_tar
from ganscale.errors import ConfigError, DataError

__all__ = ["build_shards", "check_free", "index_shards"]

_MAX_DEFAULT_STREAMS = 64
_GOLDEN = 0.6180339887498949
_MAKE_ALIKE = "To make them alike: ganscale shards build --resolution N --img-channels C"


def build_shards(
    spec: SourceSpec,
    out: str | Path,
    *,
    num_shards: int = 64,
    num_streams: int | None = None,
    limit: int | None = None,
    resolution: int | None = None,
    img_channels: int | None = None,
    progress: Progress = lambda num_samples: None,
) -> ShardSet:
    """Write a source as a shard set, several shards at a time; go on with an interrupted build.

    Args:
        spec: from `resolve_source`.
        out: a directory that does not exist yet or is empty; it appears complete or not at all.
        num_shards: tars.
        num_streams: streams of the order, which bound the number of workers; default: as many as
            shards, at most 64.
        limit: use only so many images, evenly taken from the source.
        resolution: resize the shorter side to this with anti-aliasing and cut out the centre; None
            takes only images of one size, square and a power of two.
        img_channels: 1, 3 or 4 converts; None takes only images that agree.
        progress: told how many more samples are written.

    Raises:
        ConfigError: the arguments cannot be, or another process builds the same set.
        DataError: an image cannot be used.
    """
    out = check_free(out)
    source = open_source(spec)
    ids = _spread(len(source), limit)
    if not 1 <= num_shards <= len(ids):
        raise ConfigError(f"--num-shards must be in 1..{len(ids)} (the images), got {num_shards}")
    _streams(num_streams, num_shards)
    dealt = [ids[i] for i in keyed_permutation(len(ids), "shards")]
    recipe = _Recipe(spec, resolution, img_channels)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(out, _fingerprint(recipe, source, dealt, num_shards)) as folder:
        jobs = [(recipe, folder, n, tuple(dealt[n::num_shards])) for n in range(num_shards)]
        built = _in_processes(_build_shard, jobs, progress)
        shard_set = _summarise(spec.kind, spec.split, source.classes, folder, built, num_streams)
        shard_set.save(folder)
        for record in folder.glob(".*"):
            record.unlink()
        if check_free(out).exists():
            out.rmdir()
        folder.replace(out)
    return ShardSet.load(out)


def index_shards(
    folder: str | Path,
    *,
    split: str = "train",
    num_streams: int | None = None,
    progress: Progress = lambda num_samples: None,
) -> ShardSet:
    """Index the WebDataset tars of a folder where they are, in the order of their names.

    Every image is decoded once. Raises `DataError` naming tar and key for whatever could not be
    trained on; the tars themselves are never changed.
    """
    folder = Path(folder).expanduser().absolute()
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: no .tar files to index")
    built = _in_processes(_read_shard, [(path,) for path in paths], progress)
    num_classes = 1 + max(int(shard.samples["label"].max()) for shard in built)
    classes = [str(label) for label in range(num_classes)]
    shard_set = _summarise("webdataset", split, classes, folder, built, num_streams)
    shard_set.save(folder)
    return ShardSet.load(folder)


def check_free(out: str | Path) -> Path:
    """The absolute path of a place where a set can be built; `ConfigError` if it is taken."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out or remove it")
    return out


@dataclass(frozen=True)
class _Recipe:
    """From a source's image to the PNG in the shard."""

    spec: SourceSpec
    resolution: int | None
    img_channels: int | None

    def png(self, data: bytes) -> tuple[bytes, NDArray[np.uint8]]:
        return normalised_png(data, resolution=self.resolution, img_channels=self.img_channels)


@dataclass(frozen=True)
class _BuiltShard:
    shard: Shard
    samples: Samples
    image_shape: tuple[int, int, int]
    histogram: NDArray[np.int64]
    """(C, 256) how often each value occurs."""
    example: str
    """Names an image of the shard, for errors."""

    def save(self, path: Path) -> None:
        text = json.dumps(
            {
                "shard": asdict(self.shard),
                "image_shape": self.image_shape,
                "example": self.example,
            }
        )
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, samples=self.samples, histogram=self.histogram, text=text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> _BuiltShard:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            text = json.loads(str(arrays["text"]))
            channels, height, width = text["image_shape"]
            return cls(
                shard=Shard(**text["shard"]),
                samples=arrays["samples"],
                image_shape=(channels, height, width),
                histogram=arrays["histogram"],
                example=text["example"],
            )


class _Summary:
    """Shape and histogram of the images that were looked at."""

    def __init__(self) -> None:
        self.shape: tuple[int, int, int] | None = None
        self.histogram = np.zeros((0, 256), dtype=np.int64)
        self.example = ""

    def add(self, pixels: NDArray[np.uint8], image: str) -> None:
        channels, height, width = shape = pixels.shape
        if self.shape is None:
            if height != width or height & (height - 1):
                raise DataError(
                    f"is {width}x{height}; expected square images, a power of two. "
                    "To resize and crop: ganscale shards build --resolution 32"
                )
            self.shape = (channels, height, width)
            self.example = image
            self.histogram = np.zeros((channels, 256), dtype=np.int64)
        if shape != self.shape:
            raise DataError(
                f"has (channels, height, width) {shape}, others have {self.shape}, such as "
                f"{self.example}. {_MAKE_ALIKE}"
            )
        for channel, plane in zip(self.histogram, pixels, strict=True):
            channel += np.bincount(plane.ravel(), minlength=256)

    def shard(self, path: Path, samples: Samples) -> _BuiltShard:
        if self.shape is None:
            raise DataError(f"{path} holds no samples")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard = Shard(path.name, path.stat().st_size, sha256, len(samples))
        return _BuiltShard(shard, samples, self.shape, self.histogram, self.example)


def _build_shard(recipe: _Recipe, folder: Path, number: int, ids: tuple[int, ...]) -> _BuiltShard:
    path = folder / f"shard-{number:05d}.tar"
    record = folder / f".{path.name}.npz"
    if record.exists():
        with suppress(EOFError, KeyError, ValueError, zipfile.BadZipFile):  # else: build it again
            return _BuiltShard.load(record)
    source = open_source(recipe.spec)
    summary = _Summary()
    temporary = folder / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        with _tar_writer(file) as writer:
            for index in ids:
                key, data, label = source.read(index)
                name = f"{recipe.spec}: image {key}"
                with _named(name):
                    png, pixels = recipe.png(data)
                    summary.add(pixels, name)
                label_member = {} if label < 0 else {"cls": str(label).encode()}
                writer.write({"__key__": key, **label_member, "png": png})
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    built = summary.shard(path, _rows(path))
    built.save(record)
    return built


def _read_shard(path: Path) -> _BuiltShard:
    summary = _Summary()
    samples = list(scan_tar(path))
    with path.open("rb") as file:
        for sample in samples:
            file.seek(BLOCK_BYTES * sample.block)
            name = f"{path}: sample {sample.key}"
            with _named(name):
                summary.add(normalised_png(file.read(sample.num_bytes))[1], name)
    return summary.shard(path, np.array([s.row for s in samples], dtype=SAMPLE_DTYPE))


@contextmanager
def _named(image: str) -> Iterator[None]:
    """Put the image's name before the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{image} {error}") from None


def _tar_writer(file: Any) -> Any:
    return wds.TarWriter(file, user="ganscale", group="ganscale", mtime=0.0, encoder=False)


def _rows(path: Path) -> Samples:
    return np.array([sample.row for sample in scan_tar(path)], dtype=SAMPLE_DTYPE)


def _end_with_parent() -> None:
    """A builder that is killed takes its processes along, before another goes on with its work."""
    parent = parent_process()
    assert parent is not None, "runs in a process of the pool"

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _in_processes(
    function: Callable[..., _BuiltShard], jobs: Sequence[tuple[Any, ...]], progress: Progress
) -> list[_BuiltShard]:
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                progress(future.result().shard.num_samples)
        except BrokenProcessPool:
            raise DataError(
                "a building process was killed (out of memory?); run again to go on from here"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _summarise(
    kind: str,
    split: str,
    classes: Sequence[str],
    folder: Path,
    built: list[_BuiltShard],
    num_streams: int | None,
) -> ShardSet:
    first = built[0]
    for other in built:
        if other.image_shape != first.image_shape:
            raise DataError(
                f"{other.example} has (channels, height, width) {other.image_shape}, others have "
                f"{first.image_shape}, such as {first.example}. {_MAKE_ALIKE}"
            )
    histogram = np.sum([shard.histogram for shard in built], axis=0)
    values = np.arange(256)
    mean = histogram @ values / histogram.sum(axis=1)
    square_mean = histogram @ values**2 / histogram.sum(axis=1)
    return ShardSet(
        store=LocalStore(folder),
        source=kind,
        split=split,
        classes=tuple(classes),
        image_shape=first.image_shape,
        pixel_mean=tuple(mean.tolist()),
        pixel_std=tuple(np.sqrt(square_mean - mean**2).tolist()),
        num_streams=_streams(num_streams, len(built)),
        shards=tuple(shard.shard for shard in built),
        samples=np.concatenate([shard.samples for shard in built]),
    )


def _streams(wanted: int | None, num_shards: int) -> int:
    if wanted is None:
        return min(num_shards, _MAX_DEFAULT_STREAMS)
    if not 1 <= wanted <= num_shards:
        raise ConfigError(f"--num-streams must be in 1..{num_shards} (shards), got {wanted}")
    return wanted


@contextmanager
def _partial_folder(out: Path, fingerprint: str) -> Iterator[Path]:
    """The hidden folder that a set grows in, with what an interrupted build of the same left."""
    folder = out.with_name(f".{out.name}.partial")
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{out} is being built by another process; wait for it") from None
    try:
        check_free(out)  # one that has just ended is no longer locked
        folder.mkdir(exist_ok=True)
        note = folder / ".build"
        if not (note.is_file() and note.read_text() == fingerprint):
            for path in folder.iterdir():
                path.unlink()
            note.write_text(fingerprint)
        yield folder
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _fingerprint(recipe: _Recipe, source: Source, dealt: Sequence[int], num_shards: int) -> str:
    content = [asdict(recipe), source.fingerprint, num_shards, [int(i) for i in dealt]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _spread(count: int, limit: int | None) -> list[int]:
    """One image of each of `limit` equal parts, at places in them that differ.

    So a source whose classes follow each other gives all of them, and one whose classes take turns
    as well.
    """
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    bounds = [part * count // limit for part in range(limit + 1)]
    return [
        start + int(part * _GOLDEN % 1 * (end - start))
        for part, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
