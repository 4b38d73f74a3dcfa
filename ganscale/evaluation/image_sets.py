"""Sets of images that are evaluated or serve as a reference: of a generator, shards or a folder.

Each set has a length and a digest, which is equal for sets of equal images, and reads any of its
images by index. So any number of ranks can share the work, and only the images that are being
processed are in memory. The digest names the set in caches and results; no set decodes or draws its
images for it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganscale.data.encodings import PNG
from ganscale.data.images import normalised_pixels
from ganscale.data.layout import Split
from ganscale.data.reader import ShardImages
from ganscale.data.resolve_source import resolve_source
from ganscale.data.shards import INDEX_NAME, ShardSet
from ganscale.data.sources import Source, open_source
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import ConfigError, DataError
from ganscale.generation.latents import seeded_labels_by_count
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import load_generator, snapshot_file
from ganscale.storage import is_url
from ganscale.user_cache import user_cache

Indices = NDArray[np.int64]

_ARRAYS = (
    "has arrays of floats: features and metrics are defined for 8-bit images only. "
    "ganscale sample writes such arrays and pictures of them"
)


class ImageSet(Protocol):
    """Images of one shape, by number."""

    @property
    def description(self) -> str:
        """A readable name, such as "10000 samples of runs/a/snapshots/nimg-...safetensors"."""
        ...

    @property
    def digest(self) -> str:
        """Sets with equal digests hold equal images in the same order."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) classes from 0; None where images have none."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes by label, used or not; empty where there are none."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Tensor:
        """Some images in the order asked for: uint8, (n, C, H, W), on the CPU."""
        ...


class ImagesOfShards:
    """All images of a shard set. A damaged one is a `DataError` that names it.

    Raises `DataError` if they are arrays of floats.
    """

    def __init__(self, shard_set: ShardSet) -> None:
        _check_pixels(shard_set.values, shard_set.location)
        self.shard_set = shard_set
        origin = f"{shard_set.location} ({shard_set.source}, {shard_set.split})"
        self.description = f"{shard_set.num_samples} images of {origin}"
        # That of the set's index, which holds a hash of every shard.
        self.digest = shard_set.digest
        self.shape = shard_set.image_shape
        self.classes = shard_set.classes

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        # Sets without classes store -1.
        labels = self.shard_set.samples["label"].astype(np.int64)
        return labels if len(labels) and labels.min() >= 0 else None

    def __len__(self) -> int:
        return self.shard_set.num_samples

    def read(self, indices: Indices) -> Tensor:
        images = self._reader.read(indices)
        # Evaluation never skips an image, unlike training with data.on_error=skip: a metric of
        # fewer images than its protocol says would be wrong.
        if images.damaged:
            raise images.damaged[0]
        return images.pixels

    @cached_property
    def _reader(self) -> ShardImages:
        return ShardImages(self.shard_set)


class FileImages:
    """The images of a folder or archive, in sorted order; all must have the first one's shape.

    Raises `DataError` that names the place when there is none, or arrays of floats, or the image
    that differs.
    """

    def __init__(self, source: Source, place: str) -> None:
        if not len(source):
            raise DataError(f"{place} holds no images")
        if source.encoding != PNG:
            raise DataError(f"{place} {_ARRAYS}")
        self._source = source
        self.description = f"{len(source)} images of {place}"
        self.classes = source.classes
        # Only the first image is decoded now; the others are checked when they are read.
        self.shape = self._pixels(0).shape

    @cached_property
    def digest(self) -> str:
        """The sha256 over the bytes and labels of all files."""
        # Of the files as they are, since decoding them all would take many times as long. Labels
        # count because cached features keep them.
        digest = hashlib.sha256()
        for index in range(len(self)):
            data = self._source.read(index)
            digest.update(f"{len(data)} {self._source.label(index)} ".encode())
            digest.update(data)
        return digest.hexdigest()

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Indices of the class folders; None without such folders."""
        if not self.classes:
            return None
        return np.array([self._source.label(i) for i in range(len(self))], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Indices) -> Tensor:
        """Keeps the channels of gray and RGBA images as they are."""
        pixels = np.stack([self._pixels(int(index)) for index in indices])
        return torch.from_numpy(pixels)

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        name, data = self._source.name(index), self._source.read(index)
        try:
            pixels = normalised_pixels(data)
        except DataError as error:
            raise DataError(f"{name} {error}") from None
        # Resizing here would change the metrics silently: how images are resized is part of a
        # protocol.
        if index and pixels.shape != self.shape:
            raise DataError(
                f"{name} is {_size(pixels.shape)}, the first {_size(self.shape)}; "
                "all need one size (ganscale shards build --resolution)"
            )
        return pixels


@dataclass(eq=False)
class GeneratedImages:
    """`num_images` of a generator, for the seeds `seed`, `seed` + 1, ..., drawn when they are read.

    With classes, a seed decides the label of its image. Classes are as frequent as in the training
    set, whose labels the generator was trained with: with other frequencies even a perfect
    generator would not have the distribution of the data. They are equally likely where the
    snapshot does not say how frequent they were.

    `name` says where the generator comes from, `identity` which weights it has (a digest). Raises
    `DataError` if it makes arrays of floats.
    """

    generator: SampleableGenerator
    num_images: int
    seed: int
    name: str
    identity: str

    def __post_init__(self) -> None:
        _check_pixels(self.generator.values, self.name)
        self.description = f"{self.num_images} samples of {self.name}, seeds from {self.seed}"
        counts, num_classes = self.generator.class_counts, self.generator.num_classes
        if num_classes:
            drawn = "as frequent as in the training set" if counts else "uniform"
            self.description += f", labels {drawn}"
        self._class_counts = counts or (1,) * num_classes
        # Weights, number, first seed and frequencies of the classes decide the images, so none
        # needs to be drawn. The device is left out, although its rounding may change single grey
        # levels, and so are equal frequencies, for which it does not matter whether they are known.
        key = f"{self.identity} {self.num_images} {self.seed}"
        if len(set(self._class_counts)) > 1:
            key += f" {self._class_counts}"
        self.digest = hashlib.sha256(key.encode()).hexdigest()
        # Those of the set that the generator was trained on.
        self.classes = self.generator.classes
        self._last_forward: dict[int, Tensor] = {}

    @classmethod
    def of_snapshot(
        cls, path: Path, num_images: int, *, seed: int = 0, device: str = "cpu"
    ) -> GeneratedImages:
        """Images of a snapshot file, or of the newest snapshot in a run's folder."""
        # Hashed as a file: a run's newest snapshot changes while it trains, and its name does not
        # say which weights it has.
        file = snapshot_file(path.expanduser())
        with file.open("rb") as stored:
            identity = hashlib.file_digest(stored, "sha256").hexdigest()
        return cls(load_generator(file, device=device), num_images, seed, str(file), identity)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the first image, which is drawn to find it."""
        channels, height, width = self.read(np.array([0]))[0].shape
        return channels, height, width

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """The labels that the seeds decide; None if the generator has no classes."""
        if not self.generator.num_classes:
            return None
        seeds = list(range(self.seed, self.seed + self.num_images))
        return seeded_labels_by_count(seeds, self._class_counts).numpy()

    def __len__(self) -> int:
        return self.num_images

    def read(self, indices: Indices) -> Tensor:
        """Keeps the images of the last forward, which may be asked for next."""
        numbers: list[int] = indices.tolist()
        images = dict(self._last_forward)
        drawn = [number for number in dict.fromkeys(numbers) if number not in images]
        if drawn:
            # Every forward has the same number of rows, on a GPU ten times as many as are read at
            # once. The rows that are left over draw the images that follow.
            num_rows = self.generator.forward_rows
            end = drawn[-1] + 1
            drawn += range(end, min(end + -len(drawn) % num_rows, self.num_images))
            labels = None if self.labels is None else self.labels[drawn].tolist()
            seeds = [self.seed + number for number in drawn]
            pixels = self.generator.sample_seeds(seeds, label=labels)
            images |= zip(drawn, pixels, strict=True)
            # A copy, since a view would keep all pixels in memory.
            last = pixels[-num_rows:].clone()
            self._last_forward = dict(zip(drawn[-num_rows:], last, strict=True))
        return torch.stack([images[number] for number in numbers])


def open_images(place: str, *, split: Split = "train", scratch: Path | None = None) -> ImageSet:
    """The images at a place: a shard set's folder or URL, or what `shards build --source` takes.

    Archives are unpacked, and CIFAR-10 is downloaded if it is asked for, into `scratch`, by default
    the user's cache. A warning counts what is left out. Raises `DataError` or `ConfigError` when
    there is nothing to be read.
    """
    if is_url(place) or (Path(place).expanduser() / INDEX_NAME).is_file():
        return ImagesOfShards(ShardSet.load(place))
    # The notice that tells where images come from is for `shards build`; here the set is named in
    # the protocol.
    spec, _ = resolve_source(place, split, download_dir=scratch or user_cache())
    source = open_source(spec)
    images = FileImages(source, str(spec))
    if source.left_out:
        warnings.warn(f"{spec}: left out: {source.left_out}", stacklevel=2)
    return images


def required_labels(images: ImageSet, purpose: str) -> Indices:
    """The labels of a set, (N,). Raises `ConfigError` that names the purpose if it has none."""
    labels = images.labels
    if labels is None:
        raise ConfigError(
            f"{purpose} needs labels, and {images.description} have none (a generator has them if "
            "it was trained with model.num_classes > 0)"
        )
    return labels


def _check_pixels(values: ValueRange, place: str) -> None:
    if values != PIXELS:
        raise DataError(f"{place} {_ARRAYS}")


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} with {channels} channels"
