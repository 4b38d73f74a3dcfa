"""A generator as a file to give away: weights in half precision, what it is, and a card to read.

Matrices and filters are stored in half precision, vectors (norms, biases, statistics) as they are:
these are few, and variances may lie outside half precision's range. Images are then compared with
those of the original, since what rounding does to them depends on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ganscale.atomic_files import write_text
from ganscale.errors import DataError
from ganscale.generation.model_card import card_text
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import load_generator, save_snapshot

__all__ = ["ImageDifference", "export_generator", "image_difference", "write_card"]


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
    max_difference: float,
    num_images: int = 256,
) -> ImageDifference:
    """Write a generator without its encoder in half precision, and compare its images.

    Args:
        generator: on the CPU.
        path: the .safetensors file.
        about: what people should know of it, as plain values.
        max_difference: of any value of an image, on a scale of 0 to 255.
        num_images: those that are compared, of the seeds from 0.

    Raises:
        DataError: a weight is too large for half precision, or an image differs by more; then
            nothing is left at `path`.
    """
    model = copy.deepcopy(generator.model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.data = tensor.data.half()
            if not tensor.isfinite().all():
                raise DataError(f"{name} has values beyond the range of half precision")
    save_snapshot(
        path,
        model,
        spec=generator.info["model"],
        nimg=generator.info["nimg"],
        classes=generator.info.get("classes", ()),
        values=generator.values,
        about=about,
    )
    difference = image_difference(generator, load_generator(path), num_images)
    if difference.largest > max_difference:
        path.unlink()
        raise DataError(
            f"half precision changes this generator's images: {difference}, and at most "
            f"{max_difference:g} is allowed"
        )
    return difference


def image_difference(
    generator: SampleableGenerator, other: SampleableGenerator, num_images: int
) -> ImageDifference:
    """The difference of the images that two generators make of the seeds from 0."""
    scale = 255 / (generator.values.high - generator.values.low)
    images, others = generator.sample(num_images).double(), other.sample(num_images).double()
    differences: Tensor = (images - others).abs() * scale
    return ImageDifference(num_images, float(differences.max()), float(differences.mean()))


def write_card(
    path: Path,
    generator: SampleableGenerator,
    *,
    about: Mapping[str, Any],
    file: str,
    usage: str,
    recipe: Mapping[str, Any] | None,
) -> None:
    """Write what an exported generator is beside it, as Markdown: NAME.md for NAME.safetensors.

    `file` says in which form it is there; the other arguments are those of `card_text`.
    """
    size = f"{path.stat().st_size / 1e6:.2f} MB"
    card = card_text(
        path.stem, generator, about=about, file=f"{size} {file}", usage=usage, recipe=recipe
    )
    write_text(path.with_suffix(".md"), card)
