"""Writing shard sets, and indexing WebDataset tars that are there already.

Building is deterministic: the samples are dealt to the shards by a fixed permutation, tar headers
carry no time or user, and the same input gives the same bytes. Shards are written by all cores into
a hidden folder beside the target, each renamed when it is durable; an interrupted build goes on
with those it has, and the folder gets its name when the set is complete.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import operator
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import webdataset as wds
from filelock import FileLock, Timeout
from PIL import ImageColor

from ganscale.atomic_files import replacing
from ganscale.data.channel_stats import ChannelStats
from ganscale.data.encodings import ENCODINGS, NPY, PNG, Encoding
from ganscale.data.images import Normalised
from ganscale.data.labels import check_labels, named_classes, numbered_classes
from ganscale.data.order import keyed_permutation
from ganscale.data.shards import INDEX_NAME, SAMPLE_DTYPE, Progress, Samples, Shard, ShardSet
from ganscale.data.sources import Source, SourceSpec, open_source
from ganscale.data.storage import LocalStore
from ganscale.data.tally import Tally
from ganscale.data.tars import BLOCK_BYTES, scan_tar, tars_in
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import ConfigError, DataError

__all__ = ["build_shards", "check_free", "default_num_shards", "index_shards", "source_digest"]

Notify = Callable[[str], None]

_BUILD_VERSION = 2
"""Counts up when the same source gives other shards than before."""
_MAX_DEFAULT_STREAMS = 64
_MIN_DEFAULT_SHARDS = 8
_IMAGES_PER_SHARD = 500
_GOLDEN = 0.6180339887498949
_MAKE_ALIKE = "To make them alike: ganscale shards build --resolution N --img-channels C"


def build_shards(
    spec: SourceSpec,
    out: str | Path,
    *,
    num_shards: int | None = None,
    num_streams: int | None = None,
    limit: int | None = None,
    resolution: int | None = None,
    img_channels: int | None = None,
    background: str = "white",
    value_range: tuple[float, float] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = lambda num_samples: None,
    notify: Notify = lambda message: None,
) -> ShardSet:
    """Write a source as a shard set, several shards at a time; go on with an interrupted build.

    Args:
        spec: from `resolve_source`.
        out: a directory that does not exist yet or is empty; it appears complete or not at all.
        num_shards: tars; default: `default_num_shards`.
        num_streams: streams of the order, which bound the number of workers; default: as many as
            shards, at most 64.
        limit: use only so many images, evenly taken from the source.
        resolution: resize the shorter side to this with anti-aliasing and cut out the centre; None
            takes only images of one size, square and a power of two.
        img_channels: 1, 3 or 4 converts; None takes only images that agree.
        background: colour below what is transparent where that is converted to 1 or 3 channels.
        value_range: of arrays of floats, which values become -1 and 1 to the networks; None takes
            the set's least and greatest. The shards have all values as they are.
        class_names: names in the order of labels, in place of the source's.
        progress: called with the number of samples that were written since.
        notify: called with a line about what was left out and one about what was converted.

    Raises:
        ConfigError: the arguments cannot be, or another process builds the same set.
        DataError: an image cannot be used.
    """
    out = check_free(out)
    source = open_source(spec)
    ids = _spread(len(source), limit)
    _check_colour(background)
    classes = named_classes(source.classes, class_names)
    num_shards = default_num_shards(len(ids)) if num_shards is None else num_shards
    if not 1 <= num_shards <= len(ids):
        raise ConfigError(f"--num-shards must be in 1..{len(ids)} (the images), got {num_shards}")
    _streams(num_streams, num_shards)
    _check_range(value_range, source.encoding)
    dealt = [ids[i] for i in keyed_permutation(len(ids), "shards")]
    recipe = _Recipe(spec, resolution, img_channels, background, source.fingerprint)
    if source.left_out:
        notify(f"Left out: {source.left_out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(out, _fingerprint(recipe, dealt, num_shards)) as folder:
        jobs = [(recipe, folder, n, tuple(dealt[n::num_shards])) for n in range(num_shards)]
        built = _in_processes(_build_shard, jobs, progress)
        origin = _Origin(spec.kind, spec.split, classes, value_range)
        shard_set = _summarise(origin, folder, built, num_streams)
        shard_set.save(folder)
        _notify_of(built, notify)
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
    value_range: tuple[float, float] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = lambda num_samples: None,
    notify: Notify = lambda message: None,
) -> ShardSet:
    """Index the WebDataset tars of a folder where they are, in the order of their names.

    Every image is decoded once. The arguments are those of `build_shards`; without `class_names`,
    classes are named by their numbers. Raises `ConfigError` if the folder has an index, `DataError`
    naming tar and key for whatever could not be trained on; the tars themselves are never changed.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    if (folder / INDEX_NAME).exists():
        raise ConfigError(
            f"{folder} has an index already, with its class names: see ganscale shards info; to "
            f"index it anew, remove {INDEX_NAME}"
        )
    paths = tars_in(folder)
    if not paths:
        raise DataError(f"{folder}: no .tar files to index")
    built = _in_processes(_read_shard, [(path,) for path in paths], progress)
    labels = np.concatenate([shard.samples["label"] for shard in built])
    check_labels(labels, str(folder), lambda number: _sample_name(paths, built, number))
    classes = named_classes(numbered_classes(labels), class_names)
    origin = _Origin("webdataset", split, classes, value_range)
    shard_set = _summarise(origin, folder, built, num_streams)
    shard_set.save(folder)
    _notify_of(built, notify)
    return ShardSet.load(folder)


def source_digest(spec: SourceSpec, source: Source) -> str:
    """sha256 that changes when `build_shards` would make other shards of the source by default.

    It knows a folder's files by names, sizes and times, and an archive's by their checksums.
    """
    content = (_BUILD_VERSION, spec.kind, spec.split, spec.layout, source.fingerprint)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def default_num_shards(num_images: int) -> int:
    """A power of two from 8 to 64, so that shards have 500 images; fewer for under eight images.

    Eight streams let eight workers train on the smallest set; each shard costs files and syncs.
    """
    wanted = max(num_images // _IMAGES_PER_SHARD, _MIN_DEFAULT_SHARDS)
    return min(1 << (wanted.bit_length() - 1), _MAX_DEFAULT_STREAMS, num_images)


def check_free(out: str | Path) -> Path:
    """The absolute path of a place where a set can be built; `ConfigError` if it is taken."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out or remove it")
    return out


@dataclass(frozen=True)
class _Recipe:
    """From a source's image to what lies in the shard."""

    spec: SourceSpec
    resolution: int | None
    img_channels: int | None
    background: str
    fingerprint: str
    """Of the source's content."""

    def normalised(self, data: bytes, encoding: Encoding) -> Normalised:
        return encoding.normalised(
            data,
            resolution=self.resolution,
            img_channels=self.img_channels,
            background=self.background,
        )


@dataclass(frozen=True)
class _Origin:
    """What a set's index says that its shards do not."""

    kind: str
    split: str
    classes: Sequence[str]
    value_range: tuple[float, float] | None


@dataclass(frozen=True)
class _BuiltShard:
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
        with replacing(path) as file:
            np.savez(file, samples=self.samples, text=text, **vars(self.stats))

    @classmethod
    def load(cls, path: Path) -> _BuiltShard:
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


class _Summary:
    """Form, shape and stats of the images that were looked at."""

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
            if height != width or height & (height - 1):
                raise DataError(
                    f"is {width}x{height}; expected square images, a power of two. "
                    "To resize and crop: ganscale shards build --resolution 32"
                )
            self.shape, self.encoding = (channels, height, width), encoding
            self.example = image
        if encoding != self.encoding:
            raise DataError(f"is an {encoding.noun}, {self.example} an {self.encoding.noun}")
        if shape != self.shape:
            raise DataError(
                f"has (channels, height, width) {shape}, others have {self.shape}, such as "
                f"{self.example}. {_MAKE_ALIKE}"
            )
        stats = ChannelStats.of(values)
        self.stats = stats if self.stats is None else self.stats + stats

    def shard(self, path: Path, samples: Samples) -> _BuiltShard:
        if self.shape is None or self.stats is None:
            raise DataError(f"{path} holds no samples")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard = Shard(path.name, path.stat().st_size, sha256, len(samples))
        return _BuiltShard(
            shard, samples, self.shape, self.encoding, self.stats, self.example, self.changes
        )


@functools.lru_cache(maxsize=1)
def _opened(spec: SourceSpec, fingerprint: str) -> Source:
    """The source, listed once for all shards that a process builds of one content of it."""
    source = open_source(spec)
    if source.fingerprint != fingerprint:
        raise DataError(f"{spec} was changed while shards were built from it: build again")
    return source


def _build_shard(recipe: _Recipe, folder: Path, number: int, ids: tuple[int, ...]) -> _BuiltShard:
    path = folder / f"shard-{number:05d}.tar"
    record = folder / f".{path.name}.npz"
    if record.exists():
        with suppress(EOFError, KeyError, ValueError, zipfile.BadZipFile):  # else: build it again
            return _BuiltShard.load(record)
    source = _opened(recipe.spec, recipe.fingerprint)
    summary = _Summary()
    with replacing(path) as file, _tar_writer(file) as writer:
        for index in ids:
            name, label = source.name(index), source.label(index)
            data = source.read(index)
            with _named(name):
                normalised = recipe.normalised(data, source.encoding)
                summary.add(normalised, source.encoding, name)
            fields = {} if label < 0 else {"cls": str(label).encode()}
            fields[source.encoding.suffix] = normalised.data
            writer.write({"__key__": f"{index:06d}", **fields})
    rows = np.array([sample.row for sample in scan_tar(path)], dtype=SAMPLE_DTYPE)
    built = summary.shard(path, rows)
    built.save(record)
    return built


def _read_shard(path: Path) -> _BuiltShard:
    summary = _Summary()
    samples = list(scan_tar(path, summary.changes))
    with path.open("rb") as file:
        for sample in samples:
            file.seek(BLOCK_BYTES * sample.block)
            name, encoding = f"{path}: sample {sample.key}", NPY if sample.is_array else PNG
            with _named(name):
                summary.add(encoding.normalised(file.read(sample.num_bytes)), encoding, name)
    return summary.shard(path, np.array([s.row for s in samples], dtype=SAMPLE_DTYPE))


def _notify_of(built: Sequence[_BuiltShard], notify: Notify) -> None:
    changes = functools.reduce(operator.add, [shard.changes for shard in built])
    if changes:
        notify(f"Converted or left out: {changes}")


def _sample_name(paths: Sequence[Path], built: Sequence[_BuiltShard], number: int) -> str:
    """Tar and key of a sample of the set."""
    for path, shard in zip(paths, built, strict=True):
        if number < len(shard.samples):
            sample = next(itertools.islice(scan_tar(path), number, None))
            return f"{path.name}: {sample.key}"
        number -= len(shard.samples)
    raise IndexError(number)


def _check_colour(name: str) -> None:
    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ConfigError(
            f"--background {name}: expected a colour such as white, black or #808080"
        ) from None


@contextmanager
def _named(image: str) -> Iterator[None]:
    """Put the image's name before the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{image} {error}") from None


def _tar_writer(file: Any) -> Any:
    return wds.TarWriter(file, user="ganscale", group="ganscale", mtime=0.0, encoder=False)


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
    origin: _Origin, folder: Path, built: list[_BuiltShard], num_streams: int | None
) -> ShardSet:
    first = built[0]
    for other in built:
        if other.encoding != first.encoding:
            raise DataError(
                f"{other.example} is an {other.encoding.noun}, {first.example} an "
                f"{first.encoding.noun}: a set has one kind"
            )
        if other.image_shape != first.image_shape:
            raise DataError(
                f"{other.example} has (channels, height, width) {other.image_shape}, others have "
                f"{first.image_shape}, such as {first.example}. {_MAKE_ALIKE}"
            )
    stats = functools.reduce(operator.add, [shard.stats for shard in built])
    return ShardSet(
        store=LocalStore(folder),
        source=origin.kind,
        split=origin.split,
        classes=tuple(origin.classes),
        image_shape=first.image_shape,
        pixel_mean=tuple(stats.mean.tolist()),
        pixel_std=tuple(stats.std.tolist()),
        num_streams=_streams(num_streams, len(built)),
        shards=tuple(shard.shard for shard in built),
        samples=np.concatenate([shard.samples for shard in built]),
        values=_values(first.encoding, stats, origin.value_range),
    )


def _values(
    encoding: Encoding, stats: ChannelStats, wanted: tuple[float, float] | None
) -> ValueRange:
    _check_range(wanted, encoding)
    if encoding == PNG:
        return PIXELS
    low, high = wanted or (float(stats.low.min()) + 0.0, float(stats.high.max()) + 0.0)  # no -0.0
    try:
        return ValueRange("float32", low, high)
    except ValueError as error:
        raise DataError(f"the arrays have {error}: nothing can be learnt from them") from None


def _check_range(wanted: tuple[float, float] | None, encoding: Encoding) -> None:
    if wanted is None:
        return
    if encoding == PNG:
        raise ConfigError("--value-range is for arrays of floats; these are images of 0..255")
    try:
        ValueRange("float32", *wanted)
    except ValueError as error:
        raise ConfigError(f"--value-range needs the lesser value first, got {error}") from None


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
        for path in folder.glob(".*.tmp"):  # which a killed build was writing
            path.unlink()
        yield folder
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _fingerprint(recipe: _Recipe, dealt: Sequence[int], num_shards: int) -> str:
    content = [_BUILD_VERSION, asdict(recipe), num_shards, [int(i) for i in dealt]]
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
