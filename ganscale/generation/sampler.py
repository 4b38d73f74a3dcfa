"""Images of a generator, as a function of a seed and a label."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.data.values import PIXELS, ValueRange
from ganscale.generation.latents import seeded_labels, seeded_latents

_CPU_ROWS = 16
_GPU_ROWS = 512
"""Of images up to 32x32; of larger ones as many as have as many pixels."""


def rows_per_forward(device_type: str, resolution: int) -> int:
    """How many images every forward has: 16 on the CPU; 512 of 32x32 and 16 of 256x256 on a GPU.

    The number is fixed, and what is missing is filled up: kernels choose their arithmetic by the
    batch size, so otherwise an image would depend on how many are drawn with it.
    """
    if device_type == "cpu":
        return _CPU_ROWS
    return max(_CPU_ROWS, _GPU_ROWS * 32**2 // max(32, resolution) ** 2)


class SampleableGenerator:
    """A generator in evaluation mode, with its description.

    Its images have the type of the training set: uint8 pixels, or float32 in the set's units.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        spec: dict[str, Any],
        info: dict[str, Any],
        values: ValueRange = PIXELS,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.values = values
        self.resolution: int = spec["resolution"]
        self.z_dim: int = spec["z_dim"]
        self.num_classes: int = spec["num_classes"]
        """0 for a generator that takes no labels."""
        self.classes = tuple(info.get("classes", ())) if self.num_classes else ()
        """Names of the classes by label, as in the set that it was trained on; snapshots from
        before names were kept have none."""
        self.class_counts = tuple(info.get("class_counts", ())) if self.num_classes else ()
        """How many images of each class that set has; empty where the snapshot does not say."""
        self.info = info
        """`model` (its description), `nimg`, `version`, `classes`, `class_counts`; `values` of
        arrays of floats."""

    def sample(self, num_images: int, *, seed: int = 0, label: int | None = None) -> Tensor:
        """Images for the seeds seed, seed + 1, ...: (num_images, C, H, W), on the CPU."""
        return self.sample_seeds(list(range(seed, seed + num_images)), label=label)

    def sample_seeds(self, seeds: list[int], *, label: int | list[int] | None = None) -> Tensor:
        """One image for each seed, (len(seeds), C, H, W); equal seeds give equal images.

        With classes, a seed also decides the label of its image, all of which are equally likely,
        unless `label` is given: one for all images, or one for each. Raises `ValueError` without a
        seed, or for a label that the generator does not know.
        """
        if not seeds:
            raise ValueError("expected at least one seed")
        z = seeded_latents(seeds, self.z_dim)
        labels = self._labels(seeds, label)
        rows = self.forward_rows
        parts = zip(z.split(rows), labels.split(rows), strict=True)
        # Forward by forward, since the device may not have the memory for all images.
        return torch.cat([self._rows(*part).cpu() for part in parts])

    @property
    def forward_rows(self) -> int:
        """The images of every forward on the device where the generator is."""
        return rows_per_forward(next(self.model.parameters()).device.type, self.resolution)

    def _labels(self, seeds: list[int], label: int | list[int] | None) -> Tensor:
        if label is None and self.num_classes:
            return seeded_labels(seeds, self.num_classes)
        if label is None:
            return torch.zeros(len(seeds), dtype=torch.int64)
        labels = torch.tensor(label).expand(len(seeds))
        for unknown in labels[(labels < 0) | (labels >= self.num_classes)].tolist():
            known = f"0 to {self.num_classes - 1}" if self.num_classes else "no labels"
            raise ValueError(f"label {unknown}: this generator takes {known}")
        return labels

    @torch.no_grad()
    def _rows(self, z: Tensor, labels: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        # Padding rows change no other: in evaluation mode nothing looks across the batch.
        padding = self.forward_rows - len(z)
        z = torch.cat([z, torch.zeros(padding, self.z_dim)])
        labels = torch.cat([labels, torch.zeros(padding, dtype=torch.int64)])
        images: Tensor = self.model(z.to(device), labels.to(device))[: len(z) - padding]
        return self.values.from_network(images)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8: values are rounded, and those outside are clamped."""
    return PIXELS.from_network(images)


def diversity(images: Tensor, values: ValueRange = PIXELS) -> float:
    """The diversity of images: the mean root mean square distance over all pairs.

    Args:
        images: (N, C, H, W) with N > 1.
        values: the range of values of the images.

    Returns:
        A number from 0, if all images are equal, to 255, the whole range of values. 64 real
        CIFAR-10 images have about 88 (82 to 93).
    """
    flat = images.flatten(1).double() * (255 / (values.high - values.low))
    return float(torch.pdist(flat).mean()) / math.sqrt(flat.shape[1])
