"""Which images a sheet of samples shows: for each its class and the seeds that it may come from.

A plan is made before anything is drawn and is a function of numbers alone, so the same command
shows the same images, and each of them can be drawn again by its seed and its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ganscale.generation.latents import seeded_labels


@dataclass(frozen=True)
class PlannedImage:
    """An image of a sheet: the seeds of its candidates, of which one is shown."""

    seeds: tuple[int, ...]
    label: int | None
    """The class of all candidates; None for a generator without classes."""


def plan_samples(
    num_images: int,
    *,
    seed: int,
    num_candidates: int = 1,
    num_classes: int = 0,
    label: int | None = None,
) -> list[PlannedImage]:
    """`num_images` images with `num_candidates` seeds each; all seeds follow one another.

    Without `label` the first seed of an image decides its class. All candidates have that class, so
    that choosing between them leaves every class as frequent as it is.
    """
    firsts = [seed + index * num_candidates for index in range(num_images)]
    labels: list[int | None] = [label] * num_images
    if label is None and num_classes:
        labels = list(seeded_labels(firsts, num_classes).tolist())
    return [
        PlannedImage(tuple(range(first, first + num_candidates)), image_label)
        for first, image_label in zip(firsts, labels, strict=True)
    ]


def plan_per_class(
    num_per_class: int, *, seed: int, num_candidates: int = 1, num_classes: int
) -> list[PlannedImage]:
    """`num_per_class` images of each class, class after class; each class has the same seeds."""
    # The same seeds in each row, so that a column shows what a class makes of one latent.
    return [
        image
        for label in range(num_classes)
        for image in plan_samples(
            num_per_class, seed=seed, num_candidates=num_candidates, label=label
        )
    ]


def describe_samples(
    plan: Sequence[PlannedImage], seeds: Sequence[int], *, columns: int, info: dict[str, Any]
) -> dict[str, Any]:
    """What a sheet shows as plain values, for the text of its picture.

    Args:
        plan: the images, row by row.
        seeds: the seed of each that is shown.
        columns: images of a row.
        info: of the snapshot that drew them.
    """
    summary: dict[str, Any] = {
        "model": info["model"]["name"],
        "nimg": info["nimg"],
        "columns": columns,
        "seeds": list(seeds),
    }
    labels = [image.label for image in plan if image.label is not None]
    if labels:
        summary["labels"] = labels
    # Snapshots of earlier versions have no names of classes.
    if labels and (names := info.get("classes")):
        summary["classes"] = [names[label] for label in labels]
    return summary
