"""Estimates with their uncertainty: what every metric returns.

An interval says how far the value would move with other images of the same kind. It does not
include the bias of a protocol, such as that of a Frechet distance of few samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NORMAL_QUANTILE = 1.959963984540054
"""The normal quantile of 0.975: all intervals here have 95 %."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; the interval may be missing (None)."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def wilson_interval(num_successes: int, num_trials: int) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927, JASA 22, p. 209).

    Raises `ValueError` unless there was a trial.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes in {num_trials} trials")
    # The usual interval p +- z sqrt(p (1 - p) / n) has no width at 0 or 1, where precision and
    # recall of poor generators are.
    p, n, z2 = num_successes / num_trials, num_trials, NORMAL_QUANTILE**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At p = 0 and 1 a bound is exactly 0 or 1, which rounding would miss by 1e-18.
    return Estimate(
        p,
        centre - half if num_successes else 0.0,
        centre + half if num_successes < num_trials else 1.0,
    )


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of independent repeats with Student's t interval; without one for a single value."""
    from scipy.stats import t

    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean)
    half = float(t.ppf(0.975, len(array) - 1)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Estimate(mean, mean - half, mean + half)


def bootstrap(
    num_items: int,
    statistic: Callable[[NDArray[np.int64]], float],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of items with the percentile interval of resamples with replacement (Efron 1979).

    Args:
        num_items: how many there are.
        statistic: a function of the indices of the items (num_items,), in which some are repeated.
            Means and shares are fine; distances between distributions of features are biased by
            repeated items, and take `jackknife` instead.
        num_resamples: how often items are drawn.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(0, num_items, num_items)) for _ in range(num_resamples)]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(statistic(np.arange(num_items)), float(low), float(high))


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """A statistic with the interval of its values when each of g equal groups is left out in turn.

    The variance is (g - 1) / g times the summed squared deviation (Efron and Stein 1981, Annals of
    Statistics 9, p. 586); what all the values share, such as the bias of a finite sample, drops
    out.
    """
    values: Floats = np.asarray(left_out, dtype=np.float64)
    groups = len(values)
    if groups < 2:
        raise ValueError(f"expected at least 2 groups, got {groups}")
    half = NORMAL_QUANTILE * math.sqrt(
        (groups - 1) / groups * float(np.square(values - values.mean()).sum())
    )
    return Estimate(value, value - half, value + half)
