"""Classifier two-sample tests of image sets, repeated over seeds (arXiv 1610.06545).

A repeat draws images of both sets, trains on half of them where the classifier learns, and counts
how often the classifier is right about the rest: 1/2 if both sets follow one distribution, 1 if it
always tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.image_views import Concatenated, Relabelled, Subset
from ganscale.evaluation.recognition.classifier import (
    ClassifierRecipe,
    Progress,
    predict,
    train_classifier,
)
from ganscale.metrics.intervals import Estimate, wilson_interval
from ganscale.metrics.two_sample import (
    Repeat,
    TwoSampleReport,
    accuracy_test,
    mean_estimate,
    nearest_neighbour_accuracy,
)

# No recipe augments: a generator may betray itself at an image's border, which shifts would hide.
SHORT_TEST = ClassifierRecipe(num_passes=20_000, crop_and_flip=False)
"""The recipe for CPUs: 20 seconds for each seed on one core."""

LONG_TEST = ClassifierRecipe(
    num_passes=500_000, crop_and_flip=False, width=64, blocks_per_stage=2, batch_size=128
)
"""The recipe for GPUs, with 10,000 images of each set or more."""

_NUM_IMAGES = 2000
_MIN_IMAGES = 20
"""A test needs this many images of each set, so that 20 images in all are held out."""

_REAL, _FAKE = 0, 1


def network_two_sample(
    real: ImageSet,
    fake: ImageSet,
    *,
    num_images: int = _NUM_IMAGES,
    seeds: Sequence[int] = range(5),
    recipe: ClassifierRecipe = SHORT_TEST,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> TwoSampleReport:
    """Test with a network that is trained anew for each seed, on other images.

    Args:
        real: one set.
        fake: the other, of images of the same shape.
        num_images: how many images of each set a repeat draws, limited by the smaller set; half of
            them are held out.
        seeds: one for each repeat; it decides images, split, weights and order.
        recipe: how the network is trained.
        device: the device to train on, the CPU by default.
        progress: called with the number of images trained on since the last call; `num_passes` for
            each seed in all.

    Raises:
        DataError: for fewer than 20 images of a set, other shapes, or one set as both.
        ConfigError: without a seed.
    """
    num_images = _checked_number(len(real), len(fake), num_images, seeds)
    check_images(real, fake)

    repeats = []
    for seed in seeds:
        train, held_out = _split(real, fake, num_images, seed)
        model = train_classifier(
            train, train.labels, 2, recipe=recipe, seed=seed, device=device, progress=progress
        )
        correct = predict(model, held_out) == held_out.labels
        repeats.append(_repeat(seed, correct, held_out.labels))
    return TwoSampleReport.of(num_images, repeats)


def mean_neighbour_accuracy(
    real_features: Tensor,
    fake_features: Tensor,
    *,
    num_images: int = _NUM_IMAGES,
    seeds: Sequence[int] = range(5),
) -> Estimate:
    """The mean over seeds of the leave-one-out accuracy of the 1-nearest neighbour of features.

    Args:
        real_features: (n, d).
        fake_features: (m, d).
        num_images: how many images of each set each seed draws, limited by the smaller set.
        seeds: of the repeats, which draw other images.

    Raises:
        DataError: for fewer than 20 images of a set.
        ConfigError: without a seed.
    """
    num_images = _checked_number(len(real_features), len(fake_features), num_images, seeds)
    accuracies = []
    for seed in seeds:
        one, other = (
            features[torch.from_numpy(_draw(len(features), num_images, seed, kind))]
            for kind, features in enumerate((real_features, fake_features))
        )
        accuracies.append(nearest_neighbour_accuracy(one, other, seed=seed))
    return mean_estimate(accuracies)


def _split(
    real: ImageSet, fake: ImageSet, num_images: int, seed: int
) -> tuple[Relabelled, Relabelled]:
    """Images to train on and images to test on: equally many of each set, all different."""
    parts = []
    for kind, images in enumerate((real, fake)):
        order, half = _draw(len(images), num_images, seed, kind), num_images // 2
        parts.append((Subset(images, order[:half]), Subset(images, order[half : 2 * half])))
    (real_train, real_rest), (fake_train, fake_rest) = parts
    return _real_and_fake(real_train, fake_train), _real_and_fake(real_rest, fake_rest)


def _real_and_fake(real: ImageSet, fake: ImageSet) -> Relabelled:
    """The images of both sets, labelled by the set that they are of."""
    labels = np.repeat([_REAL, _FAKE], [len(real), len(fake)])
    return Relabelled(Concatenated(real, fake), labels, ("real", "generated"))


def _draw(num_images: int, wanted: int, seed: int, kind: int) -> NDArray[np.int64]:
    # The kind is part of the seed: with equal draws, two sets in the same order, such as an image
    # and its reconstruction, would be compared pair by pair.
    order = np.random.default_rng((seed, kind)).permutation(num_images)
    return order[:wanted]


def _repeat(seed: int, correct: NDArray[np.bool_], labels: NDArray[np.int64]) -> Repeat:
    test = accuracy_test(int(correct.sum()), len(correct))
    real, fake = (
        wilson_interval(int(correct[labels == kind].sum()), int((labels == kind).sum()))
        for kind in (_REAL, _FAKE)
    )
    return Repeat(seed, test.accuracy, test.p_value, real, fake)


def _checked_number(num_real: int, num_fake: int, wanted: int, seeds: Sequence[int]) -> int:
    if not len(seeds):
        raise ConfigError("a two-sample test needs at least one seed")
    return check_num_images(num_real, num_fake, wanted)


def check_num_images(num_real: int, num_fake: int, wanted: int = _NUM_IMAGES) -> int:
    """The number of images of each set that a repeat draws. Raises `DataError` below 20."""
    # Equal numbers make chance 1/2 without weights.
    number = min(num_real, num_fake, wanted)
    if number < _MIN_IMAGES:
        raise DataError(
            f"a two-sample test needs at least {_MIN_IMAGES} images of each set, got {num_real} "
            f"and {num_fake}, of which {wanted} were asked for"
        )
    return number


def check_images(real: ImageSet, fake: ImageSet) -> None:
    """Raise `DataError` for sets of images of several shapes, or one set as both."""
    if real.shape != fake.shape:
        raise DataError(
            f"{real.description} have shape {real.shape}, {fake.description} have {fake.shape}; "
            "a two-sample test needs one shape"
        )
    # A network would be trained and tested on the same images under both labels: accuracy 1/2, as
    # if a generator were perfect.
    if real.digest == fake.digest:
        raise DataError(
            f"{real.description} would be compared with themselves; a two-sample test needs "
            "different images"
        )
