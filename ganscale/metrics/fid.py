"""The Frechet distance between two sets of features, each taken for a Gaussian.

With Inception features it is FID (Heusel et al. 2017, arXiv 1706.08500, equation 6). For n samples
it is biased by about c / n, with a c that differs between generators, so it is also extrapolated to
infinitely many (Chong and Forsyth 2020, arXiv 1911.07023).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ganscale.errors import DataError
from ganscale.metrics.intervals import Estimate, jackknife
from ganscale.metrics.statistics import Moments

# Each group costs one more eigendecomposition of (d, d), and ten give the interval's variance nine
# degrees of freedom.
_GROUPS = 10
_SIZES = 10
# Even steps of 1 / n put the points evenly on the axis of the fit. Below half of the samples the
# distance bends away from the line, most of all near as many samples as features.
_SMALLEST_PART = 0.5


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The samples may be fewer than the features: the distance is defined for a singular covariance,
    but its bias is then a large part of it, so that only distances of equally many samples can be
    compared. Raises `DataError` if the reference has no more rows than features, for then its
    covariance is singular whatever the images are, or if all rows of either are equal.
    """
    return _distance(samples, _root(reference), reference)


def frechet_estimate(features: Tensor, reference: Moments, *, seed: int = 0) -> Estimate:
    """The distance of all features (n, d), with the jackknife interval of ten random groups."""
    # The groups are taken as drawn by chance and the reference as given, so the interval is that of
    # other samples against this reference. A bootstrap would repeat images, which biases the
    # distance (`bootstrap`).
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    parts = [Moments.of(features[rows]) for rows in order.tensor_split(_GROUPS)]
    root = _root(reference)  # one decomposition for all eleven distances
    value = _distance(_sum(parts), root, reference)
    # The other groups are added up; taking one away from the total would cancel digits.
    left_out = [
        _distance(_sum(parts[:group] + parts[group + 1 :]), root, reference)
        for group in range(len(parts))
    ]
    return jackknife(value, left_out)


def frechet_infinity(features: Tensor, reference: Moments, *, seed: int = 0) -> Estimate:
    """The distance extrapolated to infinitely many samples.

    The distances of ten random subsets, from half of the samples to all of them, at even steps of
    1 / n, are fitted by a line in 1 / n; the value is where it meets 0, the interval that of the
    fit. Raises `DataError` if half of the features (n, d) are no more than d.
    """
    from scipy.stats import linregress, t

    num = len(features)
    check_extrapolation(*features.shape)
    smallest = math.ceil(_SMALLEST_PART * num)
    inverse = np.linspace(1 / num, 1 / smallest, _SIZES)
    random = np.random.default_rng(seed)
    root = _root(reference)
    distances = []
    for size in np.rint(1 / inverse).astype(int).tolist():
        chosen = torch.from_numpy(random.permutation(num)[:size])
        distances.append(_distance(Moments.of(features[chosen]), root, reference))
    fit = linregress(inverse, distances)
    # The subsets share images, so this says how well the line fits and not how far the value
    # would move with other samples.
    half = float(t.ppf(0.975, _SIZES - 2)) * float(fit.intercept_stderr)
    value = float(fit.intercept)
    return Estimate(value, value - half, value + half)


def check_reference(num_images: int, num_features: int) -> None:
    """Raise `DataError` if a reference has no more images than features."""
    if num_images <= num_features:
        raise DataError(
            f"the reference: {num_images} images are too few for {num_features} features: a "
            "Frechet distance needs a reference of more images than features"
        )


def check_samples(num_images: int) -> None:
    """Raise `DataError` if samples have no covariance."""
    if num_images < 2:
        raise DataError(f"the samples: {num_images} images are too few for a covariance")


def check_extrapolation(num_images: int, num_features: int) -> None:
    """Raise `DataError` if half of the samples are no more than there are features."""
    if math.ceil(_SMALLEST_PART * num_images) <= num_features:
        # The distance is not linear in 1 / n there.
        raise DataError(
            f"the samples: {num_images} images are too few for {num_features} features: an "
            "extrapolated Frechet distance needs more than twice as many"
        )


def _root(moments: Moments) -> Tensor:
    """R (d, d) with R R^T the covariance."""
    check_reference(moments.count, len(moments.mean))
    _check_differences(moments, "the reference")
    # Rounding makes some eigenvalues of a nearly singular covariance negative, whose roots would
    # be NaN; the true ones are at least 0. The same holds in `_distance`.
    values, vectors = torch.linalg.eigh(moments.covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _distance(samples: Moments, root: Tensor, reference: Moments) -> float:
    check_samples(samples.count)
    _check_differences(samples, "the samples")
    covariance = samples.covariance
    # tr((C1 C2)^(1/2)) is the sum of the roots of the eigenvalues of C1 C2. A matrix square root of
    # that asymmetric product, as in the first FID code, can be complex by rounding; R^T C1 R has
    # the same eigenvalues and is symmetric, up to the rounding that the average removes.
    product = root.T @ covariance @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt()
    step = samples.mean - reference.mean
    traces = covariance.trace() + reference.covariance.trace()
    return float(step.dot(step) + traces - 2 * roots.sum())


def _check_differences(moments: Moments, whose: str) -> None:
    if not moments.scatter.trace() > 0:
        raise DataError(f"{whose}: all {moments.count} images have the same features")


def _sum(parts: list[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    return total
