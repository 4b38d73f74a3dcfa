"""The kernel distance: squared maximum mean discrepancy under a cubic kernel, KID on Inception.

Unbiased at any number of samples (Binkowski et al. 2018, arXiv 1801.01401, section 4).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ganscale.errors import DataError
from ganscale.metrics.intervals import NORMAL_QUANTILE, Estimate

# Both are torch-fidelity's.
_SEED = 2020
_SUBSET_SIZE = 1000


def kernel_distance(
    samples: Tensor, reference: Tensor, *, num_subsets: int = 100, subset_size: int = _SUBSET_SIZE
) -> Estimate:
    """Mean over random subsets of both (n, d), with the interval of that mean.

    The subsets are those that torch-fidelity draws, so the value is torch-fidelity's. It may be a
    little below 0 when the sets are alike. Raises `DataError` for fewer images than a subset has.
    """
    check_subsets(len(samples), len(reference), subset_size)
    # The legacy generator, in the order samples then reference, gives torch-fidelity's subsets.
    random = np.random.RandomState(_SEED)  # noqa: NPY002
    values = np.empty(num_subsets)
    for number in range(num_subsets):
        mine = random.choice(len(samples), subset_size, replace=False)
        other = random.choice(len(reference), subset_size, replace=False)
        values[number] = _unbiased_mmd2(
            samples[torch.from_numpy(mine)], reference[torch.from_numpy(other)]
        )
    mean = float(values.mean())
    # Subsets share images, so this is the error of averaging over finitely many subsets. It says
    # nothing of other samples.
    half = NORMAL_QUANTILE * float(values.std(ddof=1)) / num_subsets**0.5
    return Estimate(mean, mean - half, mean + half)


def check_subsets(num_samples: int, num_reference: int, subset_size: int = _SUBSET_SIZE) -> None:
    """Raise `DataError` if either set has fewer images than a subset."""
    for whose, num_images in (("the samples", num_samples), ("the reference", num_reference)):
        if num_images < subset_size:
            raise DataError(
                f"{whose}: {num_images} images are too few for a kernel distance, whose subsets "
                f"have {subset_size}"
            )


def _unbiased_mmd2(x: Tensor, y: Tensor) -> float:
    """Equation 4 of the paper for x, y (m, d)."""
    m = len(x)
    # Pairs of an image with itself are left out, which makes the estimate unbiased: it does not
    # fall with the number of images as the Frechet distance does.
    within = sum(k.sum() - k.trace() for k in (_cubic(x, x), _cubic(y, y))) / (m * (m - 1))
    return float(within - 2 * _cubic(x, y).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    # The distance is a small difference of means of a million such numbers, so their sums need
    # float64; the products of features, on which the time is spent, do not.
    return ((x @ y.T).double() / x.shape[1] + 1) ** 3
