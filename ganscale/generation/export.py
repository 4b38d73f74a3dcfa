"""A generator as a file to give away: weights in half precision, and what it is.

Matrices and filters are stored in half precision, vectors (norms, biases, statistics) as they are:
these are few, and variances may lie outside half precision's range. Images are then compared with
those of the original, since what rounding does to them depends on the model.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ganscale.atomic_files import write_bytes
from ganscale.errors import DataError
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import load_generator, save_generator

_MAX_DIFFERENCE = 8.0
"""Of any value of an image, on a scale of 0 to 255, from rounding to half precision."""


@dataclass(frozen=True)
class ImageDifference:
    """How far images of the same seeds are from each other, on a scale of 0 to 255."""

    num_images: int
    largest: float
    mean: float

    def __str__(self) -> str:
        return (
            f"of {self.num_images} images the values differ by {self.largest:.3g} of 255 at most, "
            f"{self.mean:.2g} on average"
        )


def export_generator(
    generator: SampleableGenerator,
    path: Path,
    *,
    about: Mapping[str, Any],
    num_images: int = 256,
) -> ImageDifference:
    """Write a generator without its encoder in half precision, and compare its images.

    Args:
        generator: on the CPU.
        path: the .safetensors file.
        about: what people should know of it, as plain values.
        num_images: those that are compared, of the seeds from 0.

    Raises:
        DataError: a weight is too large for half precision, or a value of an image differs by more
            than 8 of 255; then `path` is left as it was.
    """
    halved = copy.copy(generator)
    halved.model = copy.deepcopy(generator.model)
    for name, tensor in halved.model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.data = tensor.data.half()
            if not tensor.isfinite().all():
                raise DataError(f"{name} has values beyond the range of half precision")
    # Read back from another place first, so that a file that is there already is replaced by a good
    # one only.
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "exported.safetensors"
        save_generator(written, halved, about)
        difference = image_difference(generator, load_generator(written), num_images)
        content = written.read_bytes()
    if difference.largest > _MAX_DIFFERENCE:
        raise DataError(
            f"half precision changes this generator's images: {difference}, and at most "
            f"{_MAX_DIFFERENCE:g} is allowed"
        )
    write_bytes(path, content)
    return difference


def image_difference(
    generator: SampleableGenerator, other: SampleableGenerator, num_images: int
) -> ImageDifference:
    """The difference of the images that two generators make of the seeds from 0."""
    scale = 255 / (generator.values.high - generator.values.low)
    images, others = generator.sample(num_images).double(), other.sample(num_images).double()
    differences: Tensor = (images - others).abs() * scale
    return ImageDifference(num_images, float(differences.max()), float(differences.mean()))
