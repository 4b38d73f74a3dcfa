"""The bound that a variational autoencoder maximises, in nats, over the global batch.

Kingma and Welling (2014, arXiv 1312.6114), for a posterior q = N(m, s^2) and the prior N(0, 1):

    log p(x) >= E_q log p(x | z) - KL(q || p)                                       (equation 3)
    KL(q || p) = 1/2 sum(m^2 + s^2 - 1 - log s^2)                                   (appendix B)

The likelihood is N(x; x', v) with one variance for all dimensions, the one that maximises it: the
mean squared error itself (Rybkin et al. 2021, arXiv 2006.13202, equation 8). So no weight between
the terms needs tuning. It takes one all-reduce a likelihood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from ganscale.training.collectives import sum_over_ranks
from ganscale.training.step_inputs import LocalBatch


@dataclass(frozen=True)
class Likelihood:
    """Of a rank's images and their reconstructions; averaged over ranks they are global means."""

    nll: Tensor
    """Negative log-likelihood in nats per dimension, ()."""
    squared_error: Tensor
    """()"""


def reconstruction_likelihood(batch: LocalBatch, target: Tensor, output: Tensor) -> Likelihood:
    """Likelihood of `target` under N(output, v), where v is the global mean squared error.

    All ranks call it together; shapes are (n, ...), images or features.
    """
    squared_error = global_squared_error(batch, target, output)
    # The variance is a constant to the gradient. That loses nothing: at the value that maximises
    # the likelihood the derivative by the variance is zero. It is that of the global batch, or
    # ranks would weigh their samples differently.
    variance = sum_over_ranks(squared_error.detach()) / dist.get_world_size()
    return Likelihood(gaussian_nll(squared_error, variance), squared_error)


def global_squared_error(batch: LocalBatch, target: Tensor, output: Tensor) -> Tensor:
    """Mean squared error of a dimension, (); its mean over ranks is that of the global batch."""
    # The mean over dimensions first, so features and images of any size compare.
    errors = (output.float() - target.float()).square().flatten(1).mean(1)
    return errors.sum() * batch.loss_weight


def posterior_kl(batch: LocalBatch, mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of the posterior from the prior in nats per image, (); its mean over ranks is global."""
    return gaussian_kl(mean, log_variance).sum() * batch.loss_weight


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of each row, (N,); arguments are (N, z_dim)."""
    squares = mean.square() + torch.exp(log_variance)
    return (squares - 1 - log_variance).sum(1) / 2


def gaussian_nll(squared_error: Tensor, variance: Tensor) -> Tensor:
    """-log N(x; x', variance) of a dimension, from its (mean) squared error."""
    # The constant has no gradient; with it the value is a likelihood, in nats, and not a score.
    return (squared_error / variance + torch.log(2 * math.pi * variance)) / 2
