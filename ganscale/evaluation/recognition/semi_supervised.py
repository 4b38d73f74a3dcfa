"""The accuracy of the classifier that a semi-supervised GAN has trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ganscale.errors import ConfigError
from ganscale.evaluation.image_sets import ImageSet, required_labels
from ganscale.evaluation.image_views import with_classes_of
from ganscale.generation.snapshot import load_classifier
from ganscale.models.classifying import ClassifyingDiscriminator

_ROWS = 256


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
    """The fraction of the images whose class has the classifier's highest logit.

    `classes` are the names of the classifier's classes, by which those of the images are matched.
    Raises `DataError` for images of other classes.
    """
    images = with_classes_of(images, classes, "the classifier")
    labels = required_labels(images, "an accuracy")
    hits = 0
    for start in range(0, len(images), _ROWS):
        numbers = np.arange(start, min(start + _ROWS, len(images)))
        pixels = images.read(numbers).to(device).float() / 127.5 - 1
        # Without `classes` the network returns its logit of being real.
        predicted = classifier(pixels, classes=True).argmax(1).cpu().numpy()
        hits += int((predicted == labels[numbers]).sum())
    return hits / len(images)
