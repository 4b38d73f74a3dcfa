"""A tournament among runs: each discriminator judges the samples of each generator.

The real images and samples by which thresholds are set differ from those that are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganscale.errors import ConfigError
from ganscale.evaluation.gan_metrics.gan_pairs import GanPair, judge_all, threshold
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet
from ganscale.evaluation.image_views import Subset, halves, with_classes_of
from ganscale.metrics.gam import Scores, score

__all__ = ["Tournament", "hold_tournament", "num_judged"]


@dataclass(frozen=True)
class Tournament:
    """The setup and the scores of a tournament."""

    reference: str
    seed: int
    uses_labels: bool
    positions: dict[str, int]
    """The positions of the GANs in real images."""
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return {
            "reference": self.reference,
            "seed": self.seed,
            "uses_labels": self.uses_labels,
            "positions": self.positions,
            **self.scores.to_json(),
        }


def hold_tournament(
    pairs: Sequence[GanPair],
    reference: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Tournament:
    """Let each discriminator judge each generator's samples, and rate all by the results.

    Labels are used if all GANs know the same number of classes and the reference has labels;
    else a discriminator with classes gives every image its highest logit over all classes.

    Args:
        pairs: two or more GANs with different names.
        reference: real images that no GAN was trained on, since a discriminator knows those.
        num_images: of each GAN and of the reference, and as many again to calibrate on;
            half of the reference where it has fewer than twice as many.
        seed: decides samples and which real images are used.
        progress: called with the number of images judged since; `num_judged` in all.

    Raises `ConfigError` for GANs that cannot be compared.
    """
    _check(pairs, reference)
    num_images = min(num_images, len(reference) // 2)
    use_labels, reference = _with_known_labels(pairs, reference)
    chosen = np.random.default_rng(seed).permutation(len(reference))[: 2 * num_images]
    calibration, test = halves(Subset(reference, chosen))
    drawn = [halves(_samples(pair, 2 * num_images, seed)) for pair in pairs]

    judges = [pair.judge for pair in pairs]
    seen = judge_all(judges, calibration, use_labels=use_labels, progress=progress)
    own = [
        judge_all([judge], fakes, use_labels=use_labels, progress=progress)[0]
        for judge, (fakes, _) in zip(judges, drawn, strict=True)
    ]
    thresholds = np.array([threshold(*both) for both in zip(seen, own, strict=True)])
    logits = [
        judge_all(judges, images, use_labels=use_labels, progress=progress)
        for images in (*(judged for _, judged in drawn), test)
    ]
    names = [pair.name for pair in pairs]
    return Tournament(
        reference=reference.description,
        seed=seed,
        uses_labels=use_labels,
        positions={pair.name: pair.nimg for pair in pairs},
        scores=score(np.stack(logits, axis=1), thresholds, names, seed=seed),
    )


def num_judged(num_pairs: int, num_images: int, reference: ImageSet) -> int:
    """How many images `hold_tournament` looks at."""
    return 2 * (num_pairs + 1) * min(num_images, len(reference) // 2)


def _samples(pair: GanPair, num_images: int, seed: int) -> ImageSet:
    return GeneratedImages(
        pair.generator,
        num_images,
        seed * num_images,
        pair.name,
        pair.identity,
    )


def _with_known_labels(pairs: Sequence[GanPair], reference: ImageSet) -> tuple[bool, ImageSet]:
    """Whether judges are given labels, and the reference with labels as the judges count them.

    They are if all GANs have the same classes and the reference has labels; what it calls
    its classes must then be known to them (`DataError`).
    """
    known = {tuple(pair.generator.classes) for pair in pairs}
    if len(known) > 1 or not (classes := known.pop()) or reference.labels is None:
        return False, reference
    return True, with_classes_of(reference, classes, pairs[0].name)


def _check(pairs: Sequence[GanPair], reference: ImageSet) -> None:
    names = [pair.name for pair in pairs]
    if len(names) < 2:
        raise ConfigError(f"a tournament needs two runs or more, got {len(names)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"the same GAN twice: {', '.join(names)}")
    if len(reference) < 2:
        raise ConfigError(f"too few test images: {reference.description}")
    for pair in pairs:
        shape = _samples(pair, 1, 0).shape
        if shape != reference.shape:
            raise ConfigError(
                f"{pair.name} makes images of shape {shape}, the reference has {reference.shape}"
            )
