"""Two-sample tests by classification: whether a classifier can distinguish two sets of images.

Where real and fake images follow one distribution no classifier is right more often than by chance
on images it has not seen, so an accuracy is a test and a measure at once (Lopez-Paz and Oquab 2017,
arXiv 1610.06545). `accuracy_test` is for the hits of any classifier on held-out images;
`nearest_neighbour_test` is the one that needs no training. Features are compared in float64:
squared distances by products cancel, and in float32 rounding would choose among close neighbours.
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
class NearestNeighbourTest:
    """Leave-one-out accuracy of the 1-nearest-neighbour classifier."""

    accuracy: Estimate
    real: Estimate
    """Share of the real images whose nearest other image is real. Low if they sit among the fake
    ones, high if the fake ones leave them out."""
    fake: Estimate
    """Share of the fake images whose nearest other image is fake. High if they crowd together, as
    they do where modes collapsed (Xu et al. 2018, arXiv 1806.07755)."""
    p_value: float


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

    classifier: str
    """ "network" or "1-nn"."""
    num_images: int
    """The number of each set in each repeat; a network is trained on half of them."""
    repeats: tuple[Repeat, ...]
    accuracy: Estimate
    """Mean over the repeats, with the mean of their intervals."""
    p_value: float
    """Twice the median over the repeats, at most 1; that of a single repeat as it is."""

    @classmethod
    def of(cls, classifier: str, num_images: int, repeats: Sequence[Repeat]) -> TwoSampleReport:
        """Sum up the tests of all seeds."""
        bounds = [(one.accuracy.value, one.accuracy.low, one.accuracy.high) for one in repeats]
        mean = Estimate(*np.array(bounds, np.float64).mean(0).tolist())
        # See the class: neither a product nor a mean of dependent p-values is a p-value.
        median = float(np.median([repeat.p_value for repeat in repeats]))
        p_value = median if len(repeats) == 1 else min(1.0, 2 * median)
        return cls(classifier, num_images, tuple(repeats), mean, p_value)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)


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


def nearest_neighbour_test(
    real_features: Tensor, fake_features: Tensor, *, seed: int = 0
) -> NearestNeighbourTest:
    """Call each image what its nearest other image is; count how often that is right.

    The hits are not independent: neighbours are often mutual, and some images are nearest to many.
    So they are compared with what they would be if the labels were randomly permuted among the same
    neighbours, of which mean and variance are known exactly (Schilling 1986, JASA 81, p. 799, for k
    neighbours); the p-value takes that distribution as normal, one-sided, with half a hit of
    continuity. The mean accuracy is then (n - 1) / (2n - 1), a little below 1/2, because an image
    is not its own neighbour. Intervals are Wilson's for as many independent trials as would have
    that variance, at most as many as there are images; off the null that number is approximate.

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
    own = is_real == is_real[nearest]
    hits = int(own.sum())
    graph = _NeighbourGraph.of(nearest)
    mean, variance = graph.moments(_probabilities_of_same(n))
    _, variance_of_one = graph.moments(_probabilities_of_real(n))
    return NearestNeighbourTest(
        accuracy=_interval(hits, 2 * n, variance),
        real=_interval(int(own[:n].sum()), n, variance_of_one),
        fake=_interval(int(own[n:].sum()), n, variance_of_one),
        p_value=_upper_tail(hits - 0.5, mean, variance),
    )


@dataclass(frozen=True)
class _NeighbourGraph:
    """The counts that decide the variance of hits when labels are randomly permuted.

    The graph has an edge from each of its N nodes. Of the N * N ordered pairs of edges, some join
    the same two nodes, some share one node, the rest share none.
    """

    num_nodes: int
    same_nodes: int
    one_shared: int

    @classmethod
    def of(cls, nearest: Tensor) -> _NeighbourGraph:
        """Count; `nearest` (N,) says where each node's edge leads."""
        number = len(nearest)
        mutual = int((nearest[nearest] == torch.arange(number)).sum())
        degrees = 1 + torch.bincount(nearest, minlength=number)
        same_nodes = number + mutual
        # Pairs that meet at a node, summed over nodes: those with the same two nodes count twice.
        return cls(number, same_nodes, int(degrees.square().sum()) - 2 * same_nodes)

    def moments(self, probabilities: tuple[float, float, float]) -> tuple[float, float]:
        """Mean and variance of the number of edges that count.

        `probabilities` are those that an edge counts, and that two edges both count which share a
        node (three nodes in all) or none (four).
        """
        one, three, four = probabilities
        apart = self.num_nodes**2 - self.same_nodes - self.one_shared
        mean = self.num_nodes * one
        # E[hits^2] sums, over ordered pairs of edges, the chance that both count.
        square = self.same_nodes * one + self.one_shared * three + apart * four
        return mean, square - mean**2


def _probabilities_of_real(n: int) -> tuple[float, float, float]:
    """An edge counts if both ends are real; n of 2n nodes are."""
    one, three, four = (math.perm(n, k) / math.perm(2 * n, k) for k in (2, 3, 4))
    return one, three, four


def _probabilities_of_same(n: int) -> tuple[float, float, float]:
    """An edge counts if its ends are of one kind; two edges apart may be of either kind each."""
    one, three, four = (2 * chance for chance in _probabilities_of_real(n))
    return one, three, four + 2 * math.perm(n, 2) ** 2 / math.perm(2 * n, 4)


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


def _interval(hits: int, trials: int, variance: float) -> Estimate:
    """Wilson's interval for the number of independent trials whose hits vary as much by chance."""
    # The variance of as many independent guesses. Dependent hits vary more, so they count as fewer
    # trials; a smaller variance does not make them more.
    independent = trials / 4
    effective = max(1, round(trials * independent / max(variance, independent)))
    interval = wilson_interval(round(effective * hits / trials), effective)
    return Estimate(hits / trials, interval.low, interval.high)


def _upper_tail(value: float, mean: float, variance: float) -> float:
    """The probability that a normal variable exceeds `value`."""
    return math.erfc((value - mean) / math.sqrt(2 * max(variance, 1e-12))) / 2
