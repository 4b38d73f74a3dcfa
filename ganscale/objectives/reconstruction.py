"""The two terms of the bound that a variational autoencoder maximises, in nats.

Kingma and Welling (2014, arXiv 1312.6114), for a posterior q = N(m, s^2) and the prior N(0, 1):

    log p(x) >= E_q log p(x | z) - KL(q || p)                                       (equation 3)
    KL(q || p) = 1/2 sum(m^2 + s^2 - 1 - log s^2)                                   (appendix B)

The likelihood is N(x; x', v) with one variance for all dimensions, the one that maximises it:
the mean squared error itself (Rybkin et al. 2021, arXiv 2006.13202, equation 8). So no weight
between the terms needs tuning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of each row, (N,); arguments are (N, z_dim)."""
    squares = mean.square() + torch.exp(log_variance)
    return (squares - 1 - log_variance).sum(1) / 2


def gaussian_nll(squared_error: Tensor, variance: Tensor) -> Tensor:
    """-log N(x; x', variance) of a dimension, from its (mean) squared error."""
    # The constant has no gradient; with it the value is a likelihood, in nats, and not a score.
    return (squared_error / variance + torch.log(2 * math.pi * variance)) / 2
