"""A tournament among runs: their generators draw, their discriminators judge.

Real images and samples that set the judges' thresholds are others than those that are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganscale.errors import ConfigError
from ganscale.evaluation.contestants import Contestant, judge_all, threshold
from ganscale.evaluation.images import GeneratedImages, ImageSet, Subset, with_classes_of
from ganscale.metrics.gam import Scores, score

__all__ = ["Tournament", "hold_tournament", "num_judged"]


@dataclass(frozen=True)
class Tournament:
    """What was held, and how it ended."""

    reference: str
    seed: int
    uses_labels: bool
    positions: dict[str, int]
    """The contestants' positions in images."""
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """As it is written in files."""
        return {
            "reference": self.reference,
            "seed": self.seed,
            "uses_labels": self.uses_labels,
            "positions": self.positions,
            **self.scores.to_json(),
        }


def hold_tournament(
    contestants: Sequence[Contestant],
    reference: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Tournament:
    """Draw, calibrate, judge, rate.

    Labels are used if all contestants know the same number of classes and the reference has labels;
    else judges with classes choose the class themselves, for all images alike.

    Args:
        contestants: two or more, of different names.
        reference: real images that no contestant was trained on, since a discriminator knows those.
        num_images: of each contestant and of the reference, and as many again to calibrate on;
            half of the reference where it has fewer than twice as many.
        seed: decides samples and which real images are used.
        progress: called with the number of images judged since; `num_judged` in all.

    Raises `ConfigError` for contestants that cannot meet.
    """
    _check(contestants, reference)
    num_images = min(num_images, len(reference) // 2)
    use_labels, reference = _with_known_labels(contestants, reference)
    chosen = np.random.default_rng(seed).permutation(len(reference))[: 2 * num_images]
    calibration, test = _halves(Subset(reference, chosen))
    drawn = [_halves(_samples(contestant, 2 * num_images, seed)) for contestant in contestants]

    judges = [contestant.judge for contestant in contestants]
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
    names = [contestant.name for contestant in contestants]
    return Tournament(
        reference=reference.description,
        seed=seed,
        uses_labels=use_labels,
        positions={contestant.name: contestant.nimg for contestant in contestants},
        scores=score(np.stack(logits, axis=1), thresholds, names, seed=seed),
    )


def num_judged(num_contestants: int, num_images: int, reference: ImageSet) -> int:
    """How many images `hold_tournament` looks at."""
    return 2 * (num_contestants + 1) * min(num_images, len(reference) // 2)


def _samples(contestant: Contestant, num_images: int, seed: int) -> ImageSet:
    return GeneratedImages(
        contestant.generator,
        num_images,
        seed * num_images,
        contestant.name,
        contestant.identity,
    )


def _halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    first, second = np.split(np.arange(len(images)), 2)
    return Subset(images, first), Subset(images, second)


def _with_known_labels(
    contestants: Sequence[Contestant], reference: ImageSet
) -> tuple[bool, ImageSet]:
    """Whether judges are given labels, and the reference with labels as the judges count them.

    They are if all contestants have the same classes and the reference has labels; what it calls
    its classes must then be known to them (`DataError`).
    """
    known = {tuple(contestant.generator.classes) for contestant in contestants}
    if len(known) > 1 or not (classes := known.pop()) or reference.labels is None:
        return False, reference
    return True, with_classes_of(reference, classes, contestants[0].name)


def _check(contestants: Sequence[Contestant], reference: ImageSet) -> None:
    names = [contestant.name for contestant in contestants]
    if len(names) < 2:
        raise ConfigError(f"a tournament needs two runs or more, got {len(names)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"the same contestant twice: {', '.join(names)}")
    if len(reference) < 2:
        raise ConfigError(f"too few test images: {reference.description}")
    for contestant in contestants:
        shape = _samples(contestant, 1, 0).shape
        if shape != reference.shape:
            raise ConfigError(
                f"{contestant.name} makes images of shape {shape}, the reference has "
                f"{reference.shape}"
            )
