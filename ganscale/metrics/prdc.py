"""Metrics by nearest neighbours of features: precision, recall, density, coverage, authenticity.

A set's manifold is the union of balls around its features, each as large as the distance to the
feature's k-th nearest neighbour of the same set (Kynkaanniemi et al. 2019, arXiv 1904.06991). All
distances are Euclidean; a few thousand rows of them are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ganscale.errors import DataError
from ganscale.metrics.intervals import Estimate, bootstrap, wilson_interval

_ROWS = 1024
# The published k: 3 for precision and recall (Kynkaanniemi et al.), 5 for density and coverage
# (Naeem et al.).
_K_PRECISION = 3
_K_DENSITY = 5


@dataclass(frozen=True)
class Prdc:
    """Precision and recall with k = 3, density and coverage with k = 5, as published."""

    precision: Estimate
    """Share of samples in the reference's manifold."""
    recall: Estimate
    """Share of the reference in the samples' manifold."""
    density: Estimate
    """Mean number of the reference's balls that a sample is in, over k; may exceed 1."""
    coverage: Estimate
    """Share of the reference's balls that hold a sample."""


def prdc(samples: Tensor, reference: Tensor, *, seed: int = 0) -> Prdc:
    """All four for (n, d) and (m, d); Naeem et al. 2020, arXiv 2002.09797, equations 1 to 4.

    Raises `DataError` if either has no more than five rows.
    """
    samples, reference = _centred(samples, reference)
    real_radii = _radii(reference, (_K_PRECISION, _K_DENSITY))
    fake_radii = _radii(samples, (_K_PRECISION,))[0]
    precise = samples.new_zeros(len(samples), dtype=torch.bool)
    counts = samples.new_zeros(len(samples), dtype=torch.int64)
    recalled = samples.new_zeros(len(reference), dtype=torch.bool)
    covered = samples.new_zeros(len(reference), dtype=torch.bool)
    # A sample at exactly a radius is inside, as in torch-fidelity. One pass over the distances
    # gives all four, since the (n, m) matrix is too large to keep.
    for rows, distances in _distances(samples, reference):
        precise[rows] = (distances <= real_radii[0]).any(1)
        inside = distances <= real_radii[1]
        counts[rows] = inside.sum(1)
        covered |= inside.any(0)
        recalled |= (distances <= fake_radii[rows, None]).any(0)
    # Shares are of images that were drawn independently, so they have Wilson's interval; density
    # may exceed 1 and is resampled over the samples. Either takes the radii as given.
    density = counts.double().cpu().numpy() / _K_DENSITY
    return Prdc(
        precision=wilson_interval(int(precise.sum()), len(precise)),
        recall=wilson_interval(int(recalled.sum()), len(recalled)),
        density=bootstrap(len(density), lambda rows: float(density[rows].mean()), seed=seed),
        coverage=wilson_interval(int(covered.sum()), len(covered)),
    )


def check_prdc(num_images: int) -> None:
    """Raise `DataError` if so many images of either set have too few neighbours for `prdc`."""
    _check_neighbours(num_images, max(_K_PRECISION, _K_DENSITY))


def check_authenticity(num_reference: int) -> None:
    """Raise `DataError` if a reference image has no neighbour for `authenticity`."""
    _check_neighbours(num_reference, 1)


def authenticity(samples: Tensor, reference: Tensor) -> Estimate:
    """Share of samples that are no near copies of a reference image (Alaa et al. 2022, 2102.08921).

    A sample counts as a copy when it is nearer to its nearest reference than that one is to its
    own nearest neighbour; section 4.3 of the paper.
    """
    samples, reference = _centred(samples, reference)
    distances, places = _nearest(samples, reference)
    own = _radii(reference, (1,))[0]
    return wilson_interval(int((distances > own[places]).sum()), len(samples))


def nearest(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and number of, the nearest reference of each sample: (n,) float and int64."""
    return _nearest(*_centred(samples, reference))


def _nearest(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    minima = [distances.min(1) for _, distances in _distances(samples, reference)]
    return torch.cat([f.values for f in minima]), torch.cat([f.indices for f in minima])


def _radii(features: Tensor, ks: tuple[int, ...]) -> Tensor:
    """Distance of each row to its k-th nearest other row, (len(ks), n)."""
    _check_neighbours(len(features), max(ks))
    radii = features.new_empty(len(ks), len(features))
    for rows, distances in _distances(features, features):
        # The row itself is excluded by its place. Taking neighbour k + 1 instead would be wrong
        # where rounding gives a row a distance to itself above that of a copy.
        distances[:, rows].fill_diagonal_(torch.inf)
        smallest = distances.topk(max(ks), largest=False).values
        radii[:, rows] = smallest[:, [k - 1 for k in ks]].T
    return radii


def _check_neighbours(num_images: int, k: int) -> None:
    if num_images <= k:
        raise DataError(f"{num_images} images are too few for {k} neighbours of each")


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x and their distances to all of y, (rows, m)."""
    for start in range(0, len(x), _ROWS):
        rows = slice(start, min(start + _ROWS, len(x)))
        yield rows, torch.cdist(x[rows], y)


def _centred(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets, shifted so that the reference's mean is 0."""
    # `cdist` computes |x|^2 + |y|^2 - 2 xy, which cancels when features lie far from 0. Distances
    # do not depend on the origin, so the shift, made in float64, costs nothing and keeps digits.
    mean = reference.double().mean(0)
    return (samples - mean).float(), (reference - mean).float()
