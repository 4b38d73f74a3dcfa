"""Real images made worse in known ways, and what every distribution metric says of them.

    python -m benchmarks.degradations --shards data/cifar10-train --num 5000 --json out.json

The reference is the first half of the set in a random order, the samples are drawn from the second:
as they are, with noise, blurred, of few classes, of few modes (groups of images alike in colour and
layout). All are of the same size, so that the bias of finite sets is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ganscale.config import MetricName
from ganscale.data.shards import ShardSet
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.features import FeatureCache
from ganscale.evaluation.image_sets import ImageSet, ImagesOfShards
from ganscale.evaluation.image_views import Subset
from ganscale.metrics.extractors import open_extractor
from ganscale.tracking.console import progress_bars, stderr_console
from ganscale.world import World, process_group

NUM_GROUPS = 50
METRICS: tuple[MetricName, ...] = (
    "fid",
    "fid_infinity",
    "kid",
    "prdc",
    "authenticity",
)


@dataclass(frozen=True, eq=False)
class Changed:
    """A set of images each of which is changed as it is read."""

    whole: ImageSet
    name: str
    change: Callable[[Tensor, int], Tensor]
    """Of an image (C, H, W) and its number."""

    @property
    def description(self) -> str:
        """What was done to what."""
        return f"{self.name}: {self.whole.description}"

    @property
    def digest(self) -> str:
        """Of the set and the change."""
        return hashlib.sha256(f"{self.name} {self.whole.digest}".encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Unchanged."""
        return self.whole.shape

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Unchanged."""
        return self.whole.labels

    @property
    def classes(self) -> Sequence[str]:
        """Unchanged."""
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Read, then change."""
        pixels = zip(self.whole.read(indices), indices.tolist(), strict=True)
        return torch.stack([self.change(image, number) for image, number in pixels])


def noise(sigma: float) -> Callable[[Tensor, int], Tensor]:
    """Normal noise of `sigma` grey levels, the same for an image each time."""

    def change(image: Tensor, number: int) -> Tensor:
        draws = torch.randn(image.shape, generator=torch.Generator().manual_seed(number))
        return (image + sigma * draws).round().clamp(0, 255).to(torch.uint8)

    return change


def blur(sigma: float) -> Callable[[Tensor, int], Tensor]:
    """A Gaussian filter of `sigma` pixels."""
    return lambda image, number: gaussian_blur(image, kernel_size=[9, 9], sigma=[sigma, sigma])


def groups(images: ImageSet) -> NDArray[np.int64]:
    """Which of 50 groups of like thumbnails each image is in, (N,)."""
    pixels = images.read(np.arange(len(images))).float()
    thumbnails = torch.nn.functional.avg_pool2d(pixels, images.shape[1] // 4).flatten(1).numpy()
    _, found = kmeans2(thumbnails, NUM_GROUPS, minit="++", rng=np.random.default_rng(0))
    numbers: NDArray[np.int64] = found.astype(np.int64)
    return numbers


def cases(rest: Subset, num: int) -> dict[str, ImageSet]:
    """The samples by what was done to them."""
    labels = rest.labels
    assert labels is not None
    group = groups(rest)
    largest = np.argsort(np.bincount(group))[::-1]
    real = Subset.random(rest, num, seed=1)

    def only(chosen: NDArray[np.bool_]) -> ImageSet:
        return Subset.random(Subset(rest, np.flatnonzero(chosen)), num, seed=1)

    return {
        "real": real,
        "noise 5": Changed(real, "noise 5", noise(5)),
        "noise 20": Changed(real, "noise 20", noise(20)),
        "noise 60": Changed(real, "noise 60", noise(60)),
        "blur 0.5": Changed(real, "blur 0.5", blur(0.5)),
        "blur 1": Changed(real, "blur 1", blur(1)),
        "blur 2": Changed(real, "blur 2", blur(2)),
        "8 of 10 classes": only(labels < 8),
        "5 of 10 classes": only(labels < 5),
        "2 of 10 classes": only(labels < 2),
        "25 of 50 modes": only(np.isin(group, largest[:25])),
        "12 of 50 modes": only(np.isin(group, largest[:12])),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", required=True, help="a labelled shard set")
    parser.add_argument("--num", type=int, default=5000, help="images of each kind")
    parser.add_argument("--extractor", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    images = ImagesOfShards(ShardSet.load(given.shards))
    order = np.random.default_rng(0).permutation(len(images))
    half = len(images) // 2
    reference, rest = (Subset(images, np.sort(part)) for part in (order[:half], order[half:]))
    extractor, world, table = open_extractor(given.extractor), World(device=given.device), {}
    extractor.to(world.device)
    with process_group(world), progress_bars(stderr_console()) as start_task:
        for name, samples in cases(rest, given.num).items():
            found = evaluate(
                samples, reference, extractor, world,
                metrics=METRICS, cache=FeatureCache(), start_task=start_task,
            )  # fmt: skip
            assert found is not None
            table[name] = found.to_json()
            values = {key: value.value for key, value in found.metrics.items()}
            if len(table) == 1:
                print(f"| {'samples':16} | " + " | ".join(values) + " |", flush=True)
                print("|---" * (len(values) + 1) + "|")
            row = " | ".join(f"{value:.4g}" for value in values.values())
            print(f"| {name:16} | {row} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
