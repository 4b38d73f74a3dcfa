"""The images whose labels may be used, where most have none; steps draw from them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganscale.data.reader import ImageReader
from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError
from ganscale.generation.latents import seed_for
from ganscale.training.step_inputs import Labelled, network_input


class LabelledPool:
    """Some labelled images, all of them on the device: 12 MB for 4,000 of CIFAR-10.

    Raises `ConfigError` if a class has too few, the reader's `DataError` if one is damaged.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        images: ImageReader,
        num_labels: int,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        # The same images on every rank and after every restart, chosen by the seed alone.
        samples = labelled_samples(shard_set, num_labels, seed=seed)
        stored = images.read(samples)
        # Not skipped, whatever `data.on_error` is: a class would silently have fewer labels.
        if stored.damaged:
            raise stored.damaged[0]
        self._pixels = stored.pixels.to(device)
        self._values = shard_set.values
        labels = shard_set.samples["label"][samples].astype(np.int64)
        self._labels = torch.from_numpy(labels).to(device)

    def pick(self, numbers: Tensor) -> Labelled:
        """One image for each of `numbers` (n, 1), uniform in [0, 1); with replacement."""
        places = numbers[:, 0] * len(self._labels)
        chosen = places.long().clamp(max=len(self._labels) - 1)  # a product may be rounded up
        images = network_input(self._pixels[chosen], self._values)
        return Labelled(images, self._labels[chosen])


def labelled_samples(shard_set: ShardSet, num_labels: int, *, seed: int) -> NDArray[np.int64]:
    """Samples of a set, as many of each class, chosen by the seed; sorted (num_labels,).

    Raises `ConfigError` if a class has too few.
    """
    labels = shard_set.samples["label"]
    num_classes = len(shard_set.classes)
    # Balanced classes, as in the experiments of Salimans et al. (2016, arXiv 1606.03498).
    per_class = num_labels // num_classes
    random = np.random.default_rng(seed_for(seed, "labelled samples"))
    chosen = []
    for number, name in enumerate(shard_set.classes):
        members = np.flatnonzero(labels == number)
        if len(members) < per_class:
            raise ConfigError(
                f"method.labels={num_labels} needs {per_class} images of each class, "
                f"{shard_set.location} has {len(members)} of {name}"
            )
        chosen.append(random.choice(members, per_class, replace=False))
    return np.sort(np.concatenate(chosen)).astype(np.int64)
