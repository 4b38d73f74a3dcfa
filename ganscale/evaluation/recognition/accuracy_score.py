"""Classification accuracy score: how well a classifier learns the classes from samples alone.

GAN-train, which is the classification accuracy score (Ravuri and Vinyals 2019, arXiv 1905.10887),
is the accuracy on real test images of a network trained on samples and the labels they were drawn
for: low if samples are poor, alike, or not of their class. GAN-test (Shmelkov et al. 2018, arXiv
1807.09499) is the accuracy on samples of a network trained on real images: it sees quality and
class only, not diversity. Both are compared with the same network trained and tested on real
images.

All networks get the same recipe, seed and number of passes. Intervals are over test images; they do
not cover that another seed would give another network.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImageSet, required_labels
from ganscale.evaluation.image_views import with_classes_of
from ganscale.evaluation.recognition.classifier import (
    ClassifierRecipe,
    Labels,
    Progress,
    predict,
    train_classifier,
)
from ganscale.metrics.intervals import NORMAL_QUANTILE, Estimate, wilson_interval

SHORT_SCORE = ClassifierRecipe(num_passes=250_000, crop_and_flip=True)
"""The recipe for CPUs: five epochs of 50,000 images, 0.795 on real CIFAR-10 in 260 s of one
core."""

LONG_SCORE = ClassifierRecipe(
    num_passes=5_000_000, crop_and_flip=True, width=64, blocks_per_stage=3, batch_size=128
)
"""The recipe for GPUs: 100 epochs of 50,000 images."""

_NAME = "the classification accuracy score"


@dataclass(frozen=True)
class ClassAccuracy:
    """Top-1 accuracy of a network on some images."""

    accuracy: Estimate
    by_class: tuple[Estimate | None, ...]
    """The accuracy on each class's images; None for a class without images."""


@dataclass(frozen=True)
class AccuracyScore:
    """Accuracies with samples as training or test images, beside those with real images alone."""

    gan_train: ClassAccuracy
    """Trained on samples, tested on real images: the classification accuracy score."""
    gan_test: ClassAccuracy
    """Trained on real images, tested on the samples. Above `real`: the samples are easier."""
    real: ClassAccuracy
    """Trained and tested on real images."""
    train_gap: Estimate
    """`real` less `gan_train`: what training on samples costs, test image by test image."""
    test_gap: Estimate
    """`real` less `gan_test`."""
    recipe: ClassifierRecipe
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)


def classification_accuracy_score(
    samples: ImageSet,
    real_train: ImageSet,
    real_test: ImageSet,
    *,
    recipe: ClassifierRecipe = SHORT_SCORE,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> AccuracyScore:
    """GAN-train, GAN-test and the real baseline, by two trainings of one recipe.

    Args:
        samples: a generator's, with the labels they were drawn for; as many as `real_train` has,
            for a fair comparison.
        real_train: what the generator was trained on.
        real_test: real images that neither generator nor network was trained on.
        recipe: of both networks.
        seed: of both networks.
        device: the device to train on; the CPU by default.
        progress: called with the number of images trained on since the last call; twice
            `num_passes` in all.

    Raises:
        ConfigError: where images have no labels, such as a generator's without classes.
        DataError: for other shapes, fewer than 2 classes, or classes that `real_train` lacks;
            classes are matched by name.
    """
    samples, real_test = matched_sets(samples, real_train, real_test)
    train_labels, num_classes = _labels_of(real_train), len(real_train.classes)
    sample_labels, test_labels = _labels_of(samples), _labels_of(real_test)
    # Two trainings give all three scores: the network of real images is tested on real images and
    # on samples.
    by_real, by_samples = (
        train_classifier(
            images,
            labels,
            num_classes,
            recipe=recipe,
            seed=seed,
            device=device,
            progress=progress,
        )
        for images, labels in ((real_train, train_labels), (samples, sample_labels))
    )
    real = predict(by_real, real_test) == test_labels
    gan_train = predict(by_samples, real_test) == test_labels
    gan_test = predict(by_real, samples) == sample_labels
    return AccuracyScore(
        gan_train=_accuracy(gan_train, test_labels, num_classes),
        gan_test=_accuracy(gan_test, sample_labels, num_classes),
        real=_accuracy(real, test_labels, num_classes),
        # Both networks saw the same test images, so their difference varies less than two separate
        # accuracies do; GAN-test is on other images, the samples.
        train_gap=paired_difference(real, gan_train),
        test_gap=unpaired_difference(real, gan_test),
        recipe=recipe,
        seed=seed,
    )


def matched_sets(
    samples: ImageSet, real_train: ImageSet, real_test: ImageSet
) -> tuple[ImageSet, ImageSet]:
    """Samples and test images with labels in the numbering of `real_train`'s classes.

    Raises what `classification_accuracy_score` raises for sets without labels, or of other shapes
    or classes.
    """
    _labels_of(real_train)
    return _with_classes_of_train(samples, real_train), _with_classes_of_train(
        real_test, real_train
    )


def paired_difference(hits: NDArray[np.bool_], other_hits: NDArray[np.bool_]) -> Estimate:
    """Difference of two accuracies on the same images, (N,) each, with the normal interval."""
    # Boolean arrays have no difference.
    differences = hits.astype(np.float64) - other_hits
    mean = float(differences.mean())
    half = NORMAL_QUANTILE * float(differences.std()) / math.sqrt(len(differences))
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half))


def unpaired_difference(hits: NDArray[np.bool_], other_hits: NDArray[np.bool_]) -> Estimate:
    """Difference of two accuracies on different images, (N,) and (M,).

    The interval squares up the distances to Wilson's bounds (Newcombe 1998, Statistics in Medicine
    17, p. 873, method 10).
    """
    one, other = (
        wilson_interval(int(correct.sum()), len(correct)) for correct in (hits, other_hits)
    )
    assert one.low is not None
    assert one.high is not None
    assert other.low is not None
    assert other.high is not None
    gap = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(gap, gap - below, gap + above)


def _labels_of(images: ImageSet) -> Labels:
    labels = required_labels(images, _NAME)
    if not len(labels):
        raise DataError(f"{images.description}: {_NAME} needs images")
    return labels


def _with_classes_of_train(images: ImageSet, train: ImageSet) -> ImageSet:
    """The images with labels in the numbering of `train`'s classes."""
    _labels_of(images)
    if images.shape != train.shape:
        raise DataError(
            f"{images.description} have shape {images.shape}, {train.description} have "
            f"{train.shape}; {_NAME} needs one shape"
        )
    return with_classes_of(images, train.classes, train.description)


def _accuracy(hits: NDArray[np.bool_], labels: Labels, num_classes: int) -> ClassAccuracy:
    # A class that is missed may be hidden in the mean of ten.
    parts = [hits[labels == number] for number in range(num_classes)]
    return ClassAccuracy(
        wilson_interval(int(hits.sum()), len(hits)),
        tuple(wilson_interval(int(part.sum()), len(part)) if len(part) else None for part in parts),
    )
