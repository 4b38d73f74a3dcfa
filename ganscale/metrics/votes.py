"""Votes of discriminators on images, counted for the images and for resamples of them.

Every sample is compared with every test image: 36 million pairs for three runs and 2,000 images.
The logits are sorted once, so that each of hundreds of resamples is counted by its weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VoteTable:
    """Shares of votes; rows are discriminators, columns the makers of the images."""

    chosen: Floats
    """(R, R): how often a sample of the column's generator gets a higher logit than a test
    image."""
    taken: Floats
    """(R, R + 1): share of images that are taken for real; the last column is the test images'."""


class Votes:
    """The votes that logits amount to.

    Args:
        logits: (R, R + 1, N): of R discriminators, on N images of R generators and, last, on N test
            images.
        thresholds: (R,) of the discriminators: above is real. A logit at the threshold counts half,
            and so does a sample that looks as real as the test image.
    """

    def __init__(self, logits: Floats, thresholds: Floats) -> None:
        self._verdicts = np.heaviside(logits - thresholds[:, None, None], 0.5)
        self._order = logits[:, -1].argsort(axis=1)
        ordered = np.take_along_axis(logits[:, -1], self._order, axis=1)
        samples = logits[:, :-1]
        rows = list(zip(ordered, samples, strict=True))
        # The mean of both sides counts a tie half.
        self._below = np.stack([np.searchsorted(test, row, "left") for test, row in rows])
        self._up_to = np.stack([np.searchsorted(test, row, "right") for test, row in rows])

    def count(self, weights: Floats) -> VoteTable:
        """The table when each maker's images count as `weights`, (R + 1, N), says."""
        num_images = weights.shape[1]
        taken = np.einsum("dmn,mn->dm", self._verdicts, weights) / num_images
        chosen = np.empty((len(self._order),) * 2)
        for row, order in enumerate(self._order):
            # The weighted share of test images below each place in their order: every sample meets
            # every test image, not one of them.
            test = np.concatenate([[0.0], weights[-1, order].cumsum()]) / num_images
            beaten = (test[self._below[row]] + test[self._up_to[row]]) / 2
            chosen[row] = (beaten * weights[:-1]).sum(axis=1) / num_images
        return VoteTable(chosen, taken)

    def table(self) -> VoteTable:
        """The table of the images as they are."""
        return self.count(np.ones(self._verdicts.shape[1:]))

    def resampled(self, num_resamples: int, *, seed: int) -> list[VoteTable]:
        """Tables of images drawn with replacement.

        A maker's images are drawn once for all discriminators: their logits of one image depend on
        each other, and separate draws would make the intervals too narrow.
        """
        random = np.random.default_rng(seed)
        num_makers, num_images = self._verdicts.shape[1:]
        even = np.full(num_images, 1 / num_images)
        drawn = (random.multinomial(num_images, even, num_makers) for _ in range(num_resamples))
        return [self.count(counts.astype(np.float64)) for counts in drawn]
