"""The inception score: classes that are sure of each image and differ between images.

Salimans et al. 2016, arXiv 1606.03498, section 4. It never looks at real images, and means
something only with the Inception network's own logits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ganscale.errors import DataError
from ganscale.metrics.intervals import Estimate, t_interval

# Both are torch-fidelity's.
_SEED = 2020
_SPLITS = 10


def inception_score(logits: Tensor) -> Estimate:
    """exp of the mean KL divergence of p(y|x) from p(y), over ten random splits of (n, classes).

    Each split estimates p(y) by its own images, which lowers the divergence: scores of different
    numbers of images cannot be compared. Raises `DataError` for fewer images than splits.
    """
    num = len(logits)
    check_splits(num)
    # The legacy generator gives torch-fidelity's order, and so its score.
    order = np.random.RandomState(_SEED).permutation(num)  # noqa: NPY002
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    bounds = [split * num // _SPLITS for split in range(_SPLITS + 1)]
    return t_interval(
        [_score(log_p[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    )


def check_splits(num_images: int) -> None:
    """Raise `DataError` if some split would have no image."""
    if num_images < _SPLITS:
        raise DataError(
            f"{num_images} images are too few for an inception score of {_SPLITS} splits"
        )


def _score(log_p: Tensor) -> float:
    p = log_p.exp()
    return float((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
