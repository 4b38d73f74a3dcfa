"""Image sets made of other image sets: a part of one, one after another, one with other labels.

Nothing is copied: each view asks the sets that it is made of when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImageSet, Indices

_NUM_SHOWN = 12


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of a set, in the order of `indices`."""

    whole: ImageSet
    indices: Indices

    @classmethod
    def random(cls, whole: ImageSet, num_images: int, *, seed: int) -> ImageSet:
        """`num_images` drawn without replacement; the whole set if it has no more."""
        if num_images >= len(whole):
            return whole
        # In ascending order, so that shards and archives are read forward.
        chosen = np.random.default_rng(seed).permutation(len(whole))[:num_images]
        return cls(whole, np.sort(chosen))

    @property
    def description(self) -> str:
        return f"{len(self)} of {self.whole.description}"

    @cached_property
    def digest(self) -> str:
        # The order is part of the digest: it decides which features belong to which image.
        return hashlib.sha256(self.whole.digest.encode() + self.indices.tobytes()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.whole.shape

    @property
    def labels(self) -> Indices | None:
        labels = self.whole.labels
        return None if labels is None else labels[self.indices]

    @property
    def classes(self) -> Sequence[str]:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Indices) -> Tensor:
        return self.whole.read(self.indices[indices])


@dataclass(frozen=True, eq=False)
class Concatenated:
    """The images of one set and then those of another one; both have the same shape and classes."""

    first: ImageSet
    second: ImageSet

    @property
    def description(self) -> str:
        return f"{self.first.description} and {self.second.description}"

    @property
    def digest(self) -> str:
        return f"{self.first.digest}+{self.second.digest}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.first.shape

    @cached_property
    def labels(self) -> Indices | None:
        """Labels of both; None if either has none."""
        first, second = self.first.labels, self.second.labels
        return None if first is None or second is None else np.concatenate([first, second])

    @property
    def classes(self) -> Sequence[str]:
        return self.first.classes

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def read(self, indices: Indices) -> Tensor:
        """Reads from each set only if one of its images is asked for."""
        of_first = indices < len(self.first)
        pixels = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        if of_first.any():
            pixels[torch.from_numpy(of_first)] = self.first.read(indices[of_first])
        if not of_first.all():
            rest = indices[~of_first] - len(self.first)
            pixels[torch.from_numpy(~of_first)] = self.second.read(rest)
        return pixels


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The images of a set with other labels and classes."""

    whole: ImageSet
    labels: Indices
    """(N,) indices into `classes`."""
    classes: Sequence[str]

    @property
    def description(self) -> str:
        return self.whole.description

    @cached_property
    def digest(self) -> str:
        # Unlike pixels, labels differ between this set and the whole, and cached features have
        # them.
        return hashlib.sha256(self.whole.digest.encode() + self.labels.tobytes()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.whole.shape

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, indices: Indices) -> Tensor:
        return self.whole.read(indices)


def halves(images: ImageSet) -> tuple[Subset, Subset]:
    """The first and the second half of a set, each of len(images) // 2 images."""
    # The last image of an odd number is left out, so that both halves have equal weight.
    middle = len(images) // 2
    return Subset(images, np.arange(middle)), Subset(images, np.arange(middle, 2 * middle))


def with_classes_of(images: ImageSet, classes: Sequence[str], owner: str) -> ImageSet:
    """The images with labels that count `classes`, matched by name; unlabelled ones as they are.

    Each set numbers its classes by itself, so equal labels need not mean equal classes: in a folder
    without one of the classes, the labels of all later classes are lower by one.

    Args:
        images: any set; each class that occurs in it must be one of `classes`.
        classes: names by label.
        owner: whose classes they are, for the message.

    Raises:
        DataError: for classes that `classes` lacks, or that have no names to compare.
    """
    labels = images.labels
    if labels is None or tuple(images.classes) == tuple(classes):
        return images
    if not images.classes or not classes:
        nameless = owner if images.classes else images.description
        raise DataError(
            f"classes are matched by name, and there are no names of classes in {nameless} (images "
            "without classes, or a generator of an earlier version of ganscale)"
        )
    # Only classes that occur need a counterpart: the test set of a run with fewer classes may list
    # all of them.
    occurring = [images.classes[label] for label in np.unique(labels)]
    unknown = [name for name in occurring if name not in classes]
    if unknown:
        raise DataError(
            f"{images.description} have classes that {owner} lacks: {_listed(unknown)}; there "
            f"the classes are {_listed(classes)}. Classes are matched by name: rename "
            "the folders, or give names with ganscale shards build --class-names"
        )
    new_label = {name: number for number, name in enumerate(classes)}
    # -1 is never looked up: it stands for classes without an image.
    numbers = np.array([new_label.get(name, -1) for name in images.classes], dtype=np.int64)
    return Relabelled(images, numbers[labels], tuple(classes))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
