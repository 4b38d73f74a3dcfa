"""Features of image sets, extracted by all ranks together, and cached by digest.

Images go through the network in fixed groups, whichever rank has them, and rank 0 puts their
features together in the order of the images. So features, and whatever is computed from them, are
the same for any number of ranks, bit for bit on one kind of machine.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch import distributed as dist

from ganscale.atomic_files import write_bytes
from ganscale.evaluation.distributions.blocks import BLOCK, map_blocks
from ganscale.evaluation.distributions.precomputed import (
    PrecomputedStatistics,
    content_digest,
    precomputed_candidates,
)
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.image_views import Subset
from ganscale.metrics.extractors import FeatureExtractor, as_rgb
from ganscale.metrics.statistics import Moments, RunningMoments, check_features
from ganscale.user_cache import user_cache
from ganscale.world import World

_ROWS = 50
"""The number of images of every forward; an incomplete group is filled with black images. Kernels
choose their arithmetic by the batch size, so the features of an image would depend on its group's
size."""
MAX_ROWS = 50_000
"""The most images of a set whose own features are kept, 400 MB for 2048 features; moments are of
all images, however many."""
_FORMAT = 3
"""Incremented when the same images and network give features that differ, if only in bits."""

T = TypeVar("T")
Progress = Callable[[int], None]
StartTask = Callable[[str, int | None], Progress]
"""Called with a part of the work and its number of images, if known; returns its progress."""


@dataclass(frozen=True)
class Features:
    """The features of an image set; only rank 0 has them."""

    rows: Tensor
    """float32, (n, d): features of all images, or of some of them drawn at random."""
    indices: NDArray[np.int64]
    """(n,) the ascending indices of those images."""
    labels: NDArray[np.int64] | None
    """(n,) the classes of those images."""


@dataclass(frozen=True)
class ReferenceFeatures(Features):
    """The features of a reference, with their moments."""

    moments: Moments
    """The moments of all images."""

    def with_rows_of(self, indices: NDArray[np.int64]) -> ReferenceFeatures:
        """The same moments with the rows of some images, which must be among those here."""
        places = np.searchsorted(self.indices, indices)
        assert np.array_equal(self.indices[places], indices)
        labels = None if self.labels is None else self.labels[places]
        rows = self.rows[torch.from_numpy(places)]
        return ReferenceFeatures(rows, indices, labels, self.moments)


def extract(
    images: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    add_rows: Callable[[Tensor], None] = lambda rows: None,
    progress: Progress = lambda num_images: None,
) -> Features | None:
    """The features of all images, on rank 0; every rank calls this inside a process group.

    `add_rows` is called on rank 0 with the features of all images, part by part in their order,
    also with those beyond the 50,000 that are returned.

    Raises `DataError`, on every rank alike, if an image cannot be read on any of them, has other
    than one or three channels, or gets a feature that is not finite.
    """
    kept = draw_indices(len(images), MAX_ROWS)
    rows = torch.empty(len(kept) if world.is_main else 0, extractor.num_features)

    def features(indices: NDArray[np.int64]) -> Tensor:
        return _block_features(images, extractor, indices)

    for where, part in map_blocks(features, images, world):
        add_rows(part)
        # Rows are kept of a random part only, so this block contributes those of its images in it.
        start, end = np.searchsorted(kept, [where[0], where[-1] + 1]).tolist()
        rows[start:end] = part[torch.from_numpy(kept[start:end] - where[0])]
        progress(len(where))
    if not world.is_main:
        return None
    labels = images.labels
    return Features(rows, kept, None if labels is None else labels[kept])


def extract_reference(
    images: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    progress: Progress = lambda num_images: None,
) -> ReferenceFeatures | None:
    """`extract`, with the moments of all images.

    Samples are extracted without: their Frechet distances are computed from rows.
    """
    moments = RunningMoments(extractor.num_features)
    features = extract(images, extractor, world, add_rows=moments.add, progress=progress)
    if features is None:
        return None
    return ReferenceFeatures(features.rows, features.indices, features.labels, moments.total())


class FeatureCache:
    """A folder of features of references, by digests of the images and of the extractor.

    The default folder is GANSCALE_CACHE, else `~/.cache/ganscale`. Digests of references' content
    are remembered as long as the object lives.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or user_cache()).expanduser() / "features"
        self._content: dict[str, str] = {}

    def extract(
        self,
        images: ImageSet,
        extractor: FeatureExtractor,
        world: World,
        *,
        progress: Progress = lambda num_images: None,
    ) -> ReferenceFeatures | None:
        """Read features from the folder, or extract them; rank 0 alone reads and writes it."""
        path = self._path(images, extractor)
        # Ranks may not share a disk, so rank 0 decides for all whether there is work.
        cached = self._load(path) if world.is_main else None
        if _broadcast_from_rank_0(cached is not None):
            progress(len(images))
            return cached
        features = extract_reference(images, extractor, world, progress=progress)
        if features is not None:
            self._save(path, features)
        return features

    def has(self, images: ImageSet, extractor: FeatureExtractor) -> bool:
        """Whether the features of these images are cached on rank 0; equal on all ranks."""
        return _broadcast_from_rank_0(self._path(images, extractor).is_file())

    def content_digest(self, images: ImageSet, world: World, start_task: StartTask) -> str:
        """The digest by `precomputed.content_digest`, computed once for each set."""
        # The digest of the images is that of their files or shards, so other encodings of the same
        # pixels are only seen to be the same by decoding them.
        if images.digest not in self._content:
            progress = start_task("comparing the reference with included statistics", len(images))
            self._content[images.digest] = content_digest(images, world, progress=progress)
        return self._content[images.digest]

    def _path(self, images: ImageSet, extractor: FeatureExtractor) -> Path:
        # Neither device nor library versions are in the key: features agree between them to
        # rounding. What changes them more increments _FORMAT.
        key = f"{_FORMAT} {extractor.digest} {images.digest}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _load(self, path: Path) -> ReferenceFeatures | None:
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
            moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])
            labels = tensors["labels"].numpy() if "labels" in tensors else None
            indices = tensors["indices"].numpy()
            return ReferenceFeatures(tensors["rows"], indices, labels, moments)
        except (SafetensorError, OSError, KeyError) as error:
            warnings.warn(f"{path} is unreadable ({error}) and is computed again", stacklevel=2)
            return None

    def _save(self, path: Path, features: ReferenceFeatures) -> None:
        """Write features, or warn: those that cannot be written are computed again next time."""
        tensors = {
            "count": torch.tensor(features.moments.count),
            "mean": features.moments.mean,
            "scatter": features.moments.scatter,
            "rows": features.rows,
            "indices": torch.from_numpy(features.indices),
        }
        if features.labels is not None:
            tensors["labels"] = torch.from_numpy(features.labels)
        try:
            write_bytes(path, save(tensors), fsync=False)
        except OSError as error:
            warnings.warn(f"features could not be written to {path}: {error}", stacklevel=2)


@dataclass(frozen=True)
class ReferencePlan:
    """The source of a reference's moments, and the images whose features are needed."""

    images: ImageSet
    """The reference."""
    statistics: PrecomputedStatistics | None
    """Statistics of all images, where the package includes them."""
    row_indices: NDArray[np.int64]
    """(n,) the images whose own features are needed, ascending."""
    extracted: ImageSet | None
    """Whose features are extracted or read from the cache; None if the statistics suffice."""

    def features(
        self,
        extractor: FeatureExtractor,
        world: World,
        *,
        cache: FeatureCache | None,
        start_task: StartTask,
    ) -> ReferenceFeatures | None:
        """Moments of all images and rows of some, on rank 0; every rank calls this."""
        extracted = None
        if self.extracted is not None:
            progress = start_task(self.extracted.description, len(self.extracted))
            keep = extract_reference if cache is None else cache.extract
            extracted = keep(self.extracted, extractor, world, progress=progress)
        if not world.is_main:
            return None
        if self.statistics is None:
            assert extracted is not None
            return extracted.with_rows_of(self.row_indices)
        moments, labels = self.statistics.moments(), self.images.labels
        if extracted is None:
            rows = torch.empty(0, extractor.num_features)
        elif self.extracted is self.images:
            rows = extracted.with_rows_of(self.row_indices).rows
        else:
            rows = extracted.rows
        labels = None if labels is None else labels[self.row_indices]
        return ReferenceFeatures(rows, self.row_indices, labels, moments)


def plan_reference(
    images: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    num_rows: int,
    cache: FeatureCache | None = None,
    start_task: StartTask = lambda what, total: lambda num_images: None,
) -> ReferencePlan:
    """Decide how the moments of all images and the features of `num_rows` are obtained.

    The moments of well-known sets ship with the package; then only the features of those rows are
    extracted, else those of all images. The rows are of the same images either way, drawn with a
    fixed seed. What is in the cache already is not extracted again.

    All ranks call this inside a process group. Raises `DataError` if an image cannot be read.
    """
    row_indices = draw_indices(len(images), min(num_rows, MAX_ROWS))
    statistics = _statistics(images, extractor, world, cache, start_task)
    extracted: ImageSet | None = images
    if statistics is not None and not len(row_indices):
        extracted = None
    elif statistics is not None and len(row_indices) < len(images):
        # A cached whole set costs nothing, and the rows that are needed are among its own.
        has_all = cache is not None and cache.has(images, extractor)
        extracted = images if has_all else Subset(images, row_indices)
    return ReferencePlan(images, statistics, row_indices, extracted)


def _statistics(
    images: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    cache: FeatureCache | None,
    start_task: StartTask,
) -> PrecomputedStatistics | None:
    # Decoding all images takes seconds, so it is done only where number and shape agree.
    for candidate in precomputed_candidates(images, extractor):
        remembered = cache or FeatureCache()
        if remembered.content_digest(images, world, start_task) == candidate.content_digest:
            return candidate
    return None


def draw_indices(num_images: int, num_drawn: int) -> NDArray[np.int64]:
    """Ascending indices drawn without replacement; a smaller draw is part of a larger one."""
    # A prefix of one permutation, so that the rows that are kept of a whole set contain every
    # smaller draw from it.
    if num_images <= num_drawn:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).permutation(num_images)[:num_drawn])


def _broadcast_from_rank_0(value: T) -> T:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _block_features(
    images: ImageSet, extractor: FeatureExtractor, indices: NDArray[np.int64]
) -> Tensor:
    """Features of some images, (BLOCK, d), followed by rows of zeros."""
    features = torch.zeros(BLOCK, extractor.num_features)
    for start in range(0, len(indices), _ROWS):
        group = as_rgb(images.read(indices[start : start + _ROWS]))
        filled = group.new_zeros(_ROWS, *group.shape[1:])
        filled[: len(group)] = group
        rows = extractor.features(filled)[: len(group)].cpu()
        check_features(rows, images.description)
        features[start : start + len(group)] = rows
    return features
