"""Writing shard sets, and indexing WebDataset tars that exist already.

Building is deterministic: the samples are dealt to the shards by a fixed permutation, tar headers
carry no time or user, and the same input gives the same bytes. Shards are written by all cores into
a hidden folder beside the target, each renamed when it is durable. An interrupted build goes on
with the shards it has, and the folder gets its name when the set is complete: a set under its own
name is always a whole one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import ImageColor

from ganscale.data.channel_stats import ChannelStats
from ganscale.data.encodings import PNG, Encoding
from ganscale.data.images import Fit
from ganscale.data.labels import check_labels, named_classes, numbered_classes
from ganscale.data.order import keyed_permutation
from ganscale.data.shard_pool import run_in_processes
from ganscale.data.shard_writer import MAKE_ALIKE, BuiltShard, Recipe, build_shard, read_shard
from ganscale.data.shards import INDEX_NAME, Progress, ShardSet
from ganscale.data.sources import Source, SourceSpec, open_source
from ganscale.data.tars import scan_tar, tars_in
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import ConfigError, DataError
from ganscale.storage import LocalStore

Notify = Callable[[str], None]

_BUILD_VERSION = 2
"""Counts up when the same source gives other shards than before."""
# A power of two, as numbers of workers mostly are; then all workers have equally many streams.
_MAX_DEFAULT_STREAMS = 64
_MIN_DEFAULT_SHARDS = 8
_IMAGES_PER_SHARD = 500
# Multiples of the golden ratio modulo 1 are spread evenly and repeat with no period; see `_spread`.
_GOLDEN = 0.6180339887498949


def build_shards(
    spec: SourceSpec,
    out: str | Path,
    *,
    num_shards: int | None = None,
    num_streams: int | None = None,
    limit: int | None = None,
    resolution: int | None = None,
    img_channels: int | None = None,
    background: str | None = None,
    fit: Fit = "crop",
    value_range: tuple[float, float] | None = None,
    class_names: Sequence[str] | None = None,
    source: Source | None = None,
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
        resolution: resize to this with anti-aliasing; None takes only images of one size, square
            and a power of two.
        img_channels: 1, 3 or 4 converts; None takes only images that agree.
        background: colour below what is transparent where that is converted to 1 or 3 channels, and
            of the borders that `fit` adds; white by default.
        fit: "crop" cuts the centre out of an image that is not square, "pad" adds borders to it.
        value_range: of arrays of floats, which values become -1 and 1 to the networks; None takes
            the set's least and greatest. The shards have all values as they are.
        class_names: names in the order of labels, in place of the source's.
        source: what `open_source` has made of `spec`; opened here by default.
        progress: called with the number of samples that were written since.
        notify: called with a line about what was left out and one about what was converted.

    Raises:
        ConfigError: the arguments cannot be, or another process builds the same set.
        DataError: an image cannot be used.
    """
    out = check_free(out)
    source = open_source(spec) if source is None else source
    ids = _spread(len(source), limit)
    if background is not None and fit != "pad" and img_channels not in (1, 3):
        raise ConfigError(
            "--background is the colour of borders and below what is transparent: give --fit pad "
            "or --img-channels 1 or 3, or leave it"
        )
    background = "white" if background is None else background
    _check_colour(background)
    if fit == "pad" and resolution is None:
        raise ConfigError("--fit pad adds borders to images that are resized: give --resolution")
    classes = named_classes(source.classes, class_names)
    num_shards = default_num_shards(len(ids)) if num_shards is None else num_shards
    if not 1 <= num_shards <= len(ids):
        raise ConfigError(f"--num-shards must be in 1..{len(ids)} (the images), got {num_shards}")
    _streams(num_streams, num_shards)
    _check_range(value_range, source.encoding)
    # Sources are often sorted by class. Dealt like this, every shard has images of all classes, so
    # that the order's windows, which see few shards at a time, mix them. The key has no seed: the
    # shards of a set are the same for everybody.
    dealt = [ids[i] for i in keyed_permutation(len(ids), "shards")]
    recipe = Recipe(spec, resolution, img_channels, background, fit, source.fingerprint)
    if source.left_out:
        notify(f"Left out: {source.left_out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    content = [_BUILD_VERSION, asdict(recipe), num_shards, [int(i) for i in dealt]]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    with _partial_folder(out, fingerprint) as folder:
        by_shard = [tuple(dealt[n::num_shards]) for n in range(num_shards)]
        jobs = [(recipe, folder, n, part, source.part(part)) for n, part in enumerate(by_shard)]
        built = run_in_processes(build_shard, jobs, progress)
        origin = _Origin(spec.kind, spec.split, classes, value_range)
        shard_set = _summarise(origin, folder, built, num_streams)
        shard_set.save(folder)
        _notify_of(built, notify)
        for record in folder.glob(".*"):
            record.unlink()
        # An empty folder may be there, which on some systems a rename does not replace.
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
    built = run_in_processes(read_shard, [(path,) for path in paths], progress)
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

    Files of a folder are told apart by names, sizes and times, members of an archive by their
    checksums: reading all images at each start would take as long as building.
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
class _Origin:
    """What a set's index says that its shards do not."""

    kind: str
    split: str
    classes: Sequence[str]
    value_range: tuple[float, float] | None


def _notify_of(built: Sequence[BuiltShard], notify: Notify) -> None:
    changes = functools.reduce(operator.add, [shard.changes for shard in built])
    if changes:
        notify(f"Converted or left out: {changes}")


def _sample_name(paths: Sequence[Path], built: Sequence[BuiltShard], number: int) -> str:
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


def _summarise(
    origin: _Origin, folder: Path, built: list[BuiltShard], num_streams: int | None
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
                f"{first.image_shape}, such as {first.example}. {MAKE_ALIKE}"
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
    # Adding 0.0 turns -0.0 into 0.0, which would be another text, and another digest, in the index.
    low, high = wanted or (float(stats.low.min()) + 0.0, float(stats.high.max()) + 0.0)
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
    """The hidden folder that a set grows in, with what an interrupted build of it has left."""
    folder = out.with_name(f".{out.name}.partial")
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{out} is being built by another process: wait for its end") from None
    try:
        check_free(out)  # again: a build that has ended since the first look holds no lock any more
        folder.mkdir(exist_ok=True)
        # Shards of another source, or with other arguments, are not gone on with but removed.
        note = folder / ".build"
        if not (note.is_file() and note.read_text() == fingerprint):
            for path in folder.iterdir():
                path.unlink()
            note.write_text(fingerprint)
        for path in folder.glob(".*.tmp"):  # which a killed build was writing
            path.unlink()
        yield folder
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held, so that it is ours
        lock.release()


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
