"""How much a GAN's samples improve a classifier that has few real images to learn from.

Generated images and their labels are added to the real ones, and the same network is trained for
equally many passes with them and without. Both are tested on real images that neither the GAN nor
the classifier was trained on. The intervals are over repeats with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImageSet, required_labels
from ganscale.evaluation.image_views import Concatenated, Subset, with_classes_of
from ganscale.evaluation.recognition.classifier import ClassifierRecipe, predict, train_classifier
from ganscale.metrics.intervals import Estimate, t_interval

_PURPOSE = "training a classifier"


@dataclass(frozen=True)
class AugmentResult:
    """Accuracies on real test images after training with and without generated images."""

    num_real: int
    num_generated: int
    real: Estimate
    """Trained on real images alone."""
    both: Estimate
    """Trained on real and generated images, for as many passes."""
    gain: Estimate
    """`both` less `real`, for each seed: the same real images, so their difference varies less."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)


def same_of_each_class(images: ImageSet, num_images: int, *, seed: int) -> Subset:
    """Some labelled images, chosen by the seed, of which each class has equally many or one more.

    Raises `ConfigError` without labels, `DataError` if a class has too few.
    """
    labels = required_labels(images, _PURPOSE)
    num_classes = len(images.classes)
    random = np.random.default_rng(seed)
    chosen = []
    for number in range(num_classes):
        wanted = num_images // num_classes + (number < num_images % num_classes)
        members = np.flatnonzero(labels == number)
        if len(members) < wanted:
            raise DataError(
                f"{images.description} have {len(members)} images of class {number}, {wanted} are "
                "needed"
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

    A seed chooses the real images, the weights and the order. `progress` is called with the number
    of images trained on since the last call; twice `recipe.num_passes` for each seed. Classes are
    matched by name. Raises `ConfigError` where images have no labels, `DataError` for other shapes
    or classes.
    """
    for images in (samples, test):
        if images.shape != train.shape:
            raise DataError(
                f"{images.description} have shape {images.shape}, {train.description} have "
                f"{train.shape}"
            )
    required_labels(samples, _PURPOSE)
    samples, test = (
        with_classes_of(images, train.classes, train.description) for images in (samples, test)
    )
    test_labels = required_labels(test, _PURPOSE)
    num_classes = len(train.classes)
    accuracies: dict[str, list[float]] = {"real": [], "both": []}
    for seed in seeds:
        # Balanced: with 500 images of ten classes a random draw may leave some class with half as
        # many as another, which would add noise to the gain.
        real = same_of_each_class(train, num_real, seed=seed)
        # Both trainings have equally many passes: generated images take the place of repetitions of
        # the few real ones, and a gain does not come from longer training.
        for name, images in (("real", real), ("both", Concatenated(real, samples))):
            network = train_classifier(
                images,
                required_labels(images, _PURPOSE),
                num_classes,
                recipe=recipe,
                seed=seed,
                device=device,
                progress=progress,
            )
            accuracies[name].append(float((predict(network, test) == test_labels).mean()))
    gains = [both - real for both, real in zip(accuracies["both"], accuracies["real"], strict=True)]
    return AugmentResult(
        num_real,
        len(samples),
        t_interval(accuracies["real"]),
        t_interval(accuracies["both"]),
        t_interval(gains),
    )
