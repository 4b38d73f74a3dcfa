"""Features of an image set, extracted by all ranks together, and kept by digest.

Images go through the network in fixed groups, whichever rank has them, and rank 0 puts their
features together in the order of the images. So features, and whatever is computed from them, are
the same for any number of ranks, bit for bit on one kind of machine.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from ganscale.errors import DataError
from ganscale.evaluation.images import ImageSet
from ganscale.metrics.extractors import FeatureExtractor, as_rgb
from ganscale.metrics.statistics import Moments, check_features
from ganscale.world import World

__all__ = ["FeatureCache", "Features", "extract"]

CACHE_ENV = "GANSCALE_CACHE"
_ROWS = 50
"""Images of every forward; an incomplete group is filled with black."""
_BLOCK = 500
"""Images that a rank works through before their features are gathered."""
_MAX_KEPT = 50_000
_FORMAT = 1

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Features:
    """What rank 0 knows of an image set; on other ranks there is none."""

    moments: Moments
    """Of all images."""
    rows: Tensor
    """float32, (n, d): of all images, or of 50,000 of them drawn at random."""
    indices: NDArray[np.int64]
    """(n,) which images those are."""
    labels: NDArray[np.int64] | None
    """(n,) their classes."""


def extract(
    images: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    progress: Progress = lambda num_images: None,
) -> Features | None:
    """The features of all images, on rank 0; every rank calls this inside a process group.

    Raises `DataError`, on every rank alike, if an image cannot be read on any of them, has other
    than one or three channels, or gets a feature that is not finite.
    """
    kept = _kept(len(images))
    rows = torch.empty(len(kept) if world.is_main else 0, extractor.num_features)
    moments = Moments.none(extractor.num_features)
    num_blocks = -(-len(images) // _BLOCK)
    for first in range(0, num_blocks, world.world_size):
        mine = _block(first + world.rank, len(images))
        block = _agreed(partial(_features, images, extractor, mine), images.description)
        for number, part in enumerate(_gathered(block, world)):
            where = _block(first + number, len(images))
            if not len(where):
                continue
            part = part[: len(where)]
            moments = moments.merged(Moments.of(part))
            start, end = np.searchsorted(kept, [where[0], where[-1] + 1]).tolist()
            rows[start:end] = part[torch.from_numpy(kept[start:end] - where[0])]
            progress(len(where))
    if not world.is_main:
        return None
    labels = images.labels
    return Features(moments, rows, kept, None if labels is None else labels[kept])


class FeatureCache:
    """Features of references in a folder, by what they are of and by what they were made with.

    The default folder is GANSCALE_CACHE, else `~/.cache/ganscale`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        default = os.environ.get(CACHE_ENV) or Path.home() / ".cache" / "ganscale"
        self.folder = Path(folder or default).expanduser() / "features"

    def extract(
        self,
        images: ImageSet,
        extractor: FeatureExtractor,
        world: World,
        *,
        progress: Progress = lambda num_images: None,
    ) -> Features | None:
        """As `extract`, from the folder if they are there; rank 0 alone reads and writes it."""
        path = self._path(images, extractor)
        found = self._load(path) if world.is_main else None
        known = [found is not None]
        dist.broadcast_object_list(known, src=0)
        if known[0]:
            progress(len(images))
            return found
        features = extract(images, extractor, world, progress=progress)
        if features is not None:
            self._save(path, features)
        return features

    def _path(self, images: ImageSet, extractor: FeatureExtractor) -> Path:
        key = f"{_FORMAT} {extractor.digest} {images.digest}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _load(self, path: Path) -> Features | None:
        if not path.is_file():
            return None
        try:
            found = load_file(path)
            moments = Moments(int(found["count"]), found["mean"], found["scatter"])
            labels = found["labels"].numpy() if "labels" in found else None
            return Features(moments, found["rows"], found["indices"].numpy(), labels)
        except (SafetensorError, OSError, KeyError) as error:
            warnings.warn(f"{path} is unreadable ({error}) and made anew", stacklevel=2)
            return None

    def _save(self, path: Path, features: Features) -> None:
        """Rather none than an error: what cannot be kept is computed again."""
        tensors = {
            "count": torch.tensor(features.moments.count),
            "mean": features.moments.mean,
            "scatter": features.moments.scatter,
            "rows": features.rows,
            "indices": torch.from_numpy(features.indices),
        }
        if features.labels is not None:
            tensors["labels"] = torch.from_numpy(features.labels)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            temporary.replace(path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            warnings.warn(f"features of {path} could not be kept: {error}", stacklevel=2)


def _kept(num_images: int) -> NDArray[np.int64]:
    """Which images' features are kept, in order."""
    if num_images <= _MAX_KEPT:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).permutation(num_images)[:_MAX_KEPT])


def _block(number: int, num_images: int) -> NDArray[np.int64]:
    return np.arange(min(number * _BLOCK, num_images), min((number + 1) * _BLOCK, num_images))


def _features(images: ImageSet, extractor: FeatureExtractor, indices: NDArray[np.int64]) -> Tensor:
    """Of some images, (_BLOCK, d); rows beyond them are 0."""
    found = torch.zeros(_BLOCK, extractor.num_features)
    for start in range(0, len(indices), _ROWS):
        group = as_rgb(images.read(indices[start : start + _ROWS]))
        filled = group.new_zeros(_ROWS, *group.shape[1:])
        filled[: len(group)] = group
        rows = extractor.features(filled)[: len(group)].cpu()
        check_features(rows, images.description)
        found[start : start + len(group)] = rows
    return found


def _agreed(action: Callable[[], Tensor], description: str) -> Tensor:
    """What `action` returns, or the same `DataError` on all ranks if it fails on any."""
    found, problem = torch.empty(0), ""
    try:
        found = action()
    except DataError as error:
        problem = str(error)
    except (OSError, RuntimeError) as error:
        problem = f"{description}: {type(error).__name__}: {error}"
    failed = torch.tensor(int(bool(problem)))
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed:
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        raise DataError(next(text for text in problems if text))
    return found


def _gathered(block: Tensor, world: World) -> list[Tensor]:
    """All ranks' blocks on rank 0, in order; nothing on others."""
    if not world.is_main:
        dist.gather(block, dst=0)
        return []
    blocks = [torch.empty_like(block) for _ in range(world.world_size)]
    dist.gather(block, blocks, dst=0)
    return blocks
