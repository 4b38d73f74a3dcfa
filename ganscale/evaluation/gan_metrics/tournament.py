"""A tournament among runs: each discriminator scores the samples of each generator.

`ganscale.metrics.gam` says what is made of the logits. Each run contributes 2 n samples and the
reference 2 n images: thresholds are calibrated on one half of each, and the other half is scored,
so that no discriminator is compared by images that its threshold was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganscale.errors import ConfigError
from ganscale.evaluation.gan_metrics.gan_pairs import GanPair, score_images, threshold
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet
from ganscale.evaluation.image_views import Subset, halves, with_classes_of
from ganscale.metrics.gam import Scores, score


@dataclass(frozen=True)
class Tournament:
    """The setup and the scores of a tournament."""

    reference: str
    seed: int
    uses_labels: bool
    why_without: str
    """Why discriminators with classes were given no labels; empty where that is not so."""
    positions: dict[str, int]
    """The positions of the GANs in real images."""
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return {
            "reference": self.reference,
            "seed": self.seed,
            "uses_labels": self.uses_labels,
            "why_without": self.why_without,
            "positions": self.positions,
            **self.scores.to_json(),
        }


def run_tournament(
    pairs: Sequence[GanPair],
    reference: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Tournament:
    """Score each generator's samples by each discriminator, and rate all runs by the logits.

    Labels are used if all GANs have the same classes and the reference has labels; else a
    conditional discriminator gives every image its highest logit over all classes.

    Args:
        pairs: two or more GANs with different names.
        reference: real images that no GAN was trained on, since a discriminator recognises those.
        num_images: of each GAN and of the reference, and as many again to calibrate on; at most
            half of the reference.
        seed: decides the samples and which real images are used.
        progress: called with the number of images scored since the last call; `num_scored` in all.

    Raises `ConfigError` for GANs that cannot be compared.
    """
    _check(pairs, reference)
    num_images = min(num_images, len(reference) // 2)
    # Whether labels are used holds for all discriminators alike: the logits of some with labels and
    # of others without would not measure the same.
    why_without = _why_without_labels(pairs, reference)
    use_labels = not why_without and bool(pairs[0].generator.classes)
    if use_labels:
        reference = with_classes_of(reference, pairs[0].generator.classes, pairs[0].name)
    # Equally many of each origin: with other numbers the thresholds and the errors would depend on
    # how many images a run happens to have.
    chosen = np.random.default_rng(seed).permutation(len(reference))[: 2 * num_images]
    calibration, test = halves(Subset(reference, chosen))
    drawn = [halves(_samples(pair, 2 * num_images, seed)) for pair in pairs]

    discriminators = [pair.discriminator for pair in pairs]
    real = score_images(discriminators, calibration, use_labels=use_labels, progress=progress)
    own = [
        score_images([discriminator], fakes, use_labels=use_labels, progress=progress)[0]
        for discriminator, (fakes, _) in zip(discriminators, drawn, strict=True)
    ]
    thresholds = np.array([threshold(*both) for both in zip(real, own, strict=True)])
    logits = [
        score_images(discriminators, images, use_labels=use_labels, progress=progress)
        for images in (*(scored for _, scored in drawn), test)
    ]
    names = [pair.name for pair in pairs]
    return Tournament(
        reference=reference.description,
        seed=seed,
        uses_labels=use_labels,
        why_without=why_without,
        positions={pair.name: pair.nimg for pair in pairs},
        scores=score(np.stack(logits, axis=1), thresholds, names, seed=seed),
    )


def num_scored(num_pairs: int, num_images: int, reference: ImageSet) -> int:
    """The number of images that `run_tournament` reports to its progress in all."""
    return 2 * (num_pairs + 1) * min(num_images, len(reference) // 2)


def _samples(pair: GanPair, num_images: int, seed: int) -> ImageSet:
    # The ranges of seeds of tournaments of one size do not overlap, so they share no sample.
    return GeneratedImages(pair.generator, num_images, seed * num_images, pair.name, pair.identity)


def _why_without_labels(pairs: Sequence[GanPair], reference: ImageSet) -> str:
    """Why conditional discriminators cannot be given labels; empty where they can, or none is.

    They can if all GANs have the same classes and the reference has labels.
    """
    conditional = [pair for pair in pairs if pair.discriminator.num_classes]
    for pair in conditional:
        if not pair.generator.classes:
            return f"neither shards nor snapshots have the names of the classes of {pair.name}"
        if pair.generator.classes != conditional[0].generator.classes:
            return f"{pair.name} has other classes than {conditional[0].name}"
    if conditional and len(conditional) < len(pairs):
        others = (pair.name for pair in pairs if not pair.discriminator.num_classes)
        return f"{', '.join(others)} trained without classes"
    if conditional and reference.labels is None:
        return f"{reference.description} has none"
    return ""


def _check(pairs: Sequence[GanPair], reference: ImageSet) -> None:
    names = [pair.name for pair in pairs]
    if len(names) < 2:
        raise ConfigError(f"a tournament needs two runs or more, got {len(names)}")
    # Tables and positions are by name.
    if len(set(names)) < len(names):
        raise ConfigError(f"a tournament has the same GAN twice: {', '.join(names)}")
    if len(reference) < 2:
        raise ConfigError(f"too few test images: {reference.description}")
    for pair in pairs:
        shape = _samples(pair, 1, 0).shape
        if shape != reference.shape:
            raise ConfigError(
                f"{pair.name} makes images of shape {shape}, the reference has {reference.shape}"
            )
