"""What a GAN is worth to a classifier: as a source of images, and as a classifier itself.

With few labelled images, generated ones with their labels are added, and the same network is
trained for as many passes with them and without. A semi-supervised GAN's own classifier is tested
as it is. All test on real images that nothing was trained on; what repeats over seeds differ by is
in the intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.classifier import ClassifierRecipe, Labels, predict, train_classifier
from ganscale.evaluation.images import ImageSet, Subset, with_classes_of
from ganscale.generation.sampling import load_classifier
from ganscale.metrics.intervals import Estimate, of_repeats
from ganscale.models.classifying import ClassifyingDiscriminator

__all__ = [
    "AugmentResult",
    "Joined",
    "augment_with_samples",
    "classifier_of_run",
    "same_of_each_class",
    "snapshot_accuracy",
]


@dataclass(frozen=True, eq=False)
class Joined:
    """The images of two sets of one shape, one after the other."""

    first: ImageSet
    second: ImageSet

    @property
    def description(self) -> str:
        """Both."""
        return f"{self.first.description} and {self.second.description}"

    @property
    def digest(self) -> str:
        """Of both."""
        return f"{self.first.digest}+{self.second.digest}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of either."""
        return self.first.shape

    @cached_property
    def labels(self) -> Labels | None:
        """Of both; None if either has none."""
        first, second = self.first.labels, self.second.labels
        return None if first is None or second is None else np.concatenate([first, second])

    @property
    def classes(self) -> Sequence[str]:
        """Those of the first set, which the second must have."""
        return self.first.classes

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """From whichever they are of."""
        first = indices < len(self.first)
        pixels = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        if first.any():
            pixels[torch.from_numpy(first)] = self.first.read(indices[first])
        if not first.all():
            others = indices[~first] - len(self.first)
            pixels[torch.from_numpy(~first)] = self.second.read(others)
        return pixels


@dataclass(frozen=True)
class AugmentResult:
    """Accuracy on real test images, by how many real images were trained on."""

    num_real: int
    num_generated: int
    real: Estimate
    """Trained on real images alone."""
    both: Estimate
    """Trained on them and the generated ones, for as many passes."""
    gain: Estimate
    """`both` less `real`, seed by seed."""

    def to_json(self) -> dict[str, Any]:
        """As it is written in files."""
        return asdict(self)


def same_of_each_class(images: ImageSet, num_images: int, *, seed: int) -> Subset:
    """Some labelled images, as many of each class or one more; chosen by the seed.

    Raises `ConfigError` without labels, `DataError` if a class has too few.
    """
    labels = _labels_of(images)
    num_classes = len(images.classes)
    random = np.random.default_rng(seed)
    chosen = []
    for number in range(num_classes):
        wanted = num_images // num_classes + (number < num_images % num_classes)
        members = np.flatnonzero(labels == number)
        if len(members) < wanted:
            raise DataError(
                f"{images.description} have {len(members)} of class {number}, not {wanted}"
            )
        chosen.append(random.permutation(members)[:wanted])
    return Subset(images, np.sort(np.concatenate(chosen)).astype(np.int64))


def augment_with_samples(
    train: ImageSet,
    samples: ImageSet,
    test: ImageSet,
    num_real: int,
    *,
    recipe: ClassifierRecipe,
    seeds: Sequence[int],
    device: torch.device | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> AugmentResult:
    """Train with `num_real` real images, and with those and all samples, for each seed.

    A seed chooses the real images, the weights, the order. `progress` is told how many images have
    passed; twice `recipe.num_passes` for each seed. Classes are matched by name. Raises
    `ConfigError` where images have no labels, `DataError` for other shapes or classes.
    """
    for images in (samples, test):
        if images.shape != train.shape:
            raise DataError(
                f"{images.description} have shape {images.shape}, {train.description} have "
                f"{train.shape}"
            )
    _labels_of(samples)
    samples, test = (
        with_classes_of(images, train.classes, train.description) for images in (samples, test)
    )
    test_labels = _labels_of(test)
    num_classes = len(train.classes)
    found: dict[str, list[float]] = {"real": [], "both": []}
    for seed in seeds:
        real = same_of_each_class(train, num_real, seed=seed)
        for name, images in (("real", real), ("both", Joined(real, samples))):
            network = train_classifier(
                images,
                _labels_of(images),
                num_classes,
                recipe=recipe,
                seed=seed,
                device=device,
                progress=progress,
            )
            found[name].append(float((predict(network, test) == test_labels).mean()))
    gains = [both - real for both, real in zip(found["both"], found["real"], strict=True)]
    return AugmentResult(
        num_real,
        len(samples),
        of_repeats(found["real"]),
        of_repeats(found["both"]),
        of_repeats(gains),
    )


def classifier_of_run(place: Path, *, device: str = "cpu") -> ClassifyingDiscriminator:
    """The averaged classifier of a semi-supervised run's newest snapshot.

    Raises `ConfigError` if it has none.
    """
    classifier = load_classifier(place, device=device)
    if classifier is None:
        raise ConfigError(
            f"{place} has no classifier: runs of method.name=semi-supervised do "
            "(ganscale train --config semi-supervised-cifar10)"
        )
    return classifier


@torch.no_grad()
def snapshot_accuracy(
    classifier: nn.Module, classes: Sequence[str], images: ImageSet, *, device: str = "cpu"
) -> float:
    """Part of the images whose class has the classifier's highest logit.

    `classes` are the names of the classifier's classes, by which those of the images are matched.
    Raises `DataError` for images of other classes.
    """
    images = with_classes_of(images, classes, "the classifier")
    labels = _labels_of(images)
    hits = 0
    for start in range(0, len(images), 256):
        numbers = np.arange(start, min(start + 256, len(images)))
        pixels = images.read(numbers).to(device).float() / 127.5 - 1
        found = classifier(pixels, classes=True).argmax(1).cpu().numpy()
        hits += int((found == labels[numbers]).sum())
    return hits / len(images)


def _labels_of(images: ImageSet) -> Labels:
    labels = images.labels
    if labels is None:
        raise ConfigError(
            f"labels are needed, and {images.description} have none (a generator has them if it "
            "was trained with model.num_classes > 0)"
        )
    return labels
