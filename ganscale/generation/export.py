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

import yaml
from torch import Tensor

from ganscale.atomic_files import write_text
from ganscale.errors import DataError
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
    difference: ImageDifference,
    recipe: Mapping[str, Any] | None,
) -> None:
    """Write what an exported generator is beside it, as Markdown: NAME.md for NAME.safetensors."""
    model, info = generator.model, generator.info
    spec = info["model"]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    classes = ", ".join(info.get("classes", ())) if spec["num_classes"] else ""
    facts = {
        "model": f"{spec['name']}, {num_parameters / 1e6:.2f} million parameters",
        "images": f"{spec['img_channels']}x{spec['resolution']}x{spec['resolution']}",
        "classes": f"{spec['num_classes']}: {classes}" if spec["num_classes"] else "none",
        "trained on": f"{info['nimg']:,} real images",
        **{name: _fact(value) for name, value in about.items()},
        "file": f"{path.stat().st_size / 1e6:.2f} MB in half precision; {difference}",
    }
    lines = [f"# {path.stem}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {' '.join(str(value).split())} |" for name, value in facts.items()]
    lines += [
        "",
        "```python",
        "import ganscale",
        "",
        f'generator = ganscale.load_generator("{path.name}")',
        "images = generator.sample(16, seed=0)  # uint8, (16, C, H, W)",
        "```",
    ]
    if recipe is not None:
        text = yaml.safe_dump(dict(recipe), sort_keys=False).rstrip()
        lines += ["", "The configuration that it was trained with:", "", "```yaml", text, "```"]
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
