"""Two-sample tests by classification: whether a classifier can distinguish two sets of images.

Where real and fake images follow one distribution no classifier is right more often than by chance
on images it has not seen, so an accuracy is a test and a measure at once (Lopez-Paz and Oquab 2017,
arXiv 1610.06545). `accuracy_test` is for the hits of any classifier on held-out images;
`nearest_neighbour_accuracy` needs no training. Features are compared in float64: squared distances
by products cancel, and in float32 rounding would choose among close neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganscale.metrics.intervals import Estimate, wilson_interval

_CHUNK_DISTANCES = 2**24
"""How many distances are held at once: 128 MiB of them."""

_TIE = 1e-12
"""Squared distances this close, as parts of what they are made of, are equal."""


@dataclass(frozen=True)
class AccuracyTest:
    """How often a classifier was right about held-out images, half of them real."""

    accuracy: Estimate
    p_value: float
    """How often a classifier that guesses would do as well or better."""


@dataclass(frozen=True)
class Repeat:
    """The result of one test, with one seed."""

    seed: int
    accuracy: Estimate
    p_value: float
    real: Estimate
    """Accuracy on real images alone."""
    fake: Estimate
    """Accuracy on fake images alone."""


@dataclass(frozen=True)
class TwoSampleReport:
    """All repeats and what they say together.

    The repeats draw from the same images, so they are not independent, and neither product nor mean
    of their p-values is one. Twice the median is, whatever their dependence (Meinshausen, Meier and
    Buehlmann 2009, arXiv 0811.2177, who repeat splits of data likewise). The mean accuracy has the
    mean of the repeats' intervals: a mean of dependent values varies at most as much as one alone.
    """

    num_images: int
    """The number of each set in each repeat; a network is trained on half of them."""
    repeats: tuple[Repeat, ...]
    accuracy: Estimate
    """Mean over the repeats, with the mean of their intervals."""
    p_value: float
    """Twice the median over the repeats, at most 1; that of a single repeat as it is."""

    @classmethod
    def of(cls, num_images: int, repeats: Sequence[Repeat]) -> TwoSampleReport:
        """Sum up the tests of all seeds."""
        mean = mean_estimate([repeat.accuracy for repeat in repeats])
        # See the class: neither a product nor a mean of dependent p-values is a p-value.
        median = float(np.median([repeat.p_value for repeat in repeats]))
        p_value = median if len(repeats) == 1 else min(1.0, 2 * median)
        return cls(num_images, tuple(repeats), mean, p_value)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of dependent estimates and of their intervals; see `TwoSampleReport`."""
    bounds = [(one.value, one.low, one.high) for one in estimates]
    return Estimate(*np.array(bounds, np.float64).mean(0).tolist())


def accuracy_test(num_correct: int, num_trials: int) -> AccuracyTest:
    """Accuracy with Wilson's interval and the exact one-sided binomial p-value against 1/2.

    Exact for independent trials. Held-out images that are half real and half fake are less spread
    than that, never more, so the p-value errs on the safe side. Raises `ValueError` unless there
    was a trial.
    """
    from scipy.stats import binomtest

    accuracy = wilson_interval(num_correct, num_trials)
    p_value = binomtest(num_correct, num_trials, 0.5, alternative="greater").pvalue
    return AccuracyTest(accuracy, float(p_value))


def nearest_neighbour_accuracy(
    real_features: Tensor, fake_features: Tensor, *, seed: int = 0
) -> Estimate:
    """How often the nearest other image of an image is of its own set, real or fake.

    That is the leave-one-out accuracy of the 1-nearest-neighbour classifier. By chance it is
    (n - 1) / (2n - 1), a little below 1/2, because an image is not its own neighbour.

    The hits are not independent: neighbours are often mutual, and some images are nearest to many.
    Their variance is known exactly where the labels are randomly permuted among the same neighbours
    (Schilling 1986, JASA 81, p. 799, for k neighbours). The interval is Wilson's for as many
    independent trials as would have that variance, at most as many as there are images; where the
    sets differ that number is approximate.

    Equally near neighbours, of which exact copies are the usual case, are drawn from at random
    whatever their labels, so copies favour neither side.

    Args:
        real_features: (n, d), n > 1, finite.
        fake_features: (n, d), as many.
        seed: of the draws among equally near neighbours.

    Raises:
        ValueError: for other shapes, unequal numbers or numbers that are not finite.
    """
    n = _check(real_features, fake_features)
    pool = torch.cat([real_features, fake_features.to(real_features.device)]).double()
    nearest = _nearest_others(pool - pool.mean(0), seed).cpu()
    is_real = torch.arange(2 * n) < n
    hits = int((is_real == is_real[nearest]).sum())
    # The variance of as many independent guesses. Dependent hits vary more, so they count as fewer
    # trials; a smaller variance does not make them more.
    independent = 2 * n / 4
    effective = max(1, round(2 * n * independent / max(_variance_of_hits(nearest), independent)))
    interval = wilson_interval(round(effective * hits / (2 * n)), effective)
    return Estimate(hits / (2 * n), interval.low, interval.high)


def _variance_of_hits(nearest: Tensor) -> float:
    """The variance of the number of hits when the labels are permuted, half of them real.

    `nearest` (N,) says which node's is the nearest to each: an edge from each of N nodes, which is
    a hit if both of its ends are real or both are fake. Of the N * N ordered pairs of edges, some
    join the same two nodes, some share one node, the rest share none.
    """
    number = len(nearest)
    n = number // 2
    mutual = int((nearest[nearest] == torch.arange(number)).sum())
    degrees = 1 + torch.bincount(nearest, minlength=number)
    same_nodes = number + mutual
    # Pairs that meet at a node, summed over nodes: those with the same two nodes count twice.
    one_shared = int(degrees.square().sum()) - 2 * same_nodes
    apart = number**2 - same_nodes - one_shared
    # The chances that two, three and four nodes are of one kind. Two edges that are apart are also
    # hits if one is of two real nodes and the other of two fake ones.
    two, three, four = (2 * math.perm(n, k) / math.perm(number, k) for k in (2, 3, 4))
    four += 2 * math.perm(n, 2) ** 2 / math.perm(number, 4)
    # E[hits^2] sums, over ordered pairs of edges, the chance that both are hits.
    return same_nodes * two + one_shared * three + apart * four - (number * two) ** 2


def _check(real: Tensor, fake: Tensor) -> int:
    """The number of images of each set. Raises `ValueError` if the test is not defined for them."""
    # Equal numbers are needed for accuracy 1/2 to be chance.
    if real.ndim != 2 or real.shape != fake.shape or len(real) < 2:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"expected two sets of features (n, d) with one n > 1, got {shapes}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("expected finite features")
    return len(real)


def _nearest_others(pool: Tensor, seed: int) -> Tensor:
    """(N,) the number of each row's nearest other row; `pool` is (N, d) float64, centred."""
    draws = torch.Generator(pool.device).manual_seed(seed)
    squares = pool.square().sum(1)
    everyone = torch.arange(len(pool), device=pool.device)
    neighbours = []
    for rows in everyone.split(max(1, _CHUNK_DISTANCES // len(pool))):
        distances = squares[rows, None] + squares - 2 * pool[rows] @ pool.T
        # An image is not its own neighbour: without this every image would be right.
        distances[rows - rows[0], rows] = math.inf
        least, nearest = distances.min(1)
        tied = distances <= (least + _TIE * (squares[rows] + least.abs()))[:, None]
        # Real images come first, so the first of several minima would favour them among copies.
        several = tied.sum(1) > 1
        if several.any():
            drawn = torch.multinomial(tied[several].double(), 1, generator=draws)
            nearest[several] = drawn.squeeze(1)
        neighbours.append(nearest)
    return torch.cat(neighbours)
