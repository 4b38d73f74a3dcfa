"""What judges say of images, counted, and counted again for images drawn with replacement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Table", "Votes"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """What judges (rows) said: shares chosen over test images, (R, R); taken for real, (R, R + 1).

    The last column of `taken` is that of the test images.
    """

    chosen: Floats
    taken: Floats


class Votes:
    """Logits as what they decide.

    Args:
        logits: (R, R + 1, N): of R judges, on N images of R makers and, last, on N test images.
        thresholds: (R,) of the judges: above is real. A logit at the threshold counts half, and so
            does a sample that looks as real as the test image.
    """

    def __init__(self, logits: Floats, thresholds: Floats) -> None:
        self._verdicts = np.heaviside(logits - thresholds[:, None, None], 0.5)
        self._order = logits[:, -1].argsort(axis=1)
        ordered = np.take_along_axis(logits[:, -1], self._order, axis=1)
        samples = logits[:, :-1]
        rows = list(zip(ordered, samples, strict=True))
        self._below = np.stack([np.searchsorted(test, row, "left") for test, row in rows])
        self._up_to = np.stack([np.searchsorted(test, row, "right") for test, row in rows])

    def count(self, weights: Floats) -> Table:
        """The table when each maker's images count as `weights`, (R + 1, N), says."""
        num_images = weights.shape[1]
        taken = np.einsum("jmn,mn->jm", self._verdicts, weights) / num_images
        chosen = np.empty((len(self._order),) * 2)
        for judge, order in enumerate(self._order):
            test = np.concatenate([[0.0], weights[-1, order].cumsum()]) / num_images
            beaten = (test[self._below[judge]] + test[self._up_to[judge]]) / 2
            chosen[judge] = (beaten * weights[:-1]).sum(axis=1) / num_images
        return Table(chosen, taken)

    def table(self) -> Table:
        """What was said of the images."""
        return self.count(np.ones(self._verdicts.shape[1:]))

    def resampled(self, num_resamples: int, *, seed: int) -> list[Table]:
        """Tables of images drawn with replacement.

        A maker's images are drawn once for all judges, since what one judge thinks of an image is
        much what another does.
        """
        random = np.random.default_rng(seed)
        num_makers, num_images = self._verdicts.shape[1:]
        even = np.full(num_images, 1 / num_images)
        drawn = (random.multinomial(num_images, even, num_makers) for _ in range(num_resamples))
        return [self.count(counts.astype(np.float64)) for counts in drawn]
