"""How likely images are under reconstructions of them, over the global batch.

The variance of the likelihood is that of all ranks' errors, so that W workers minimise what one
would; this takes one all-reduce a likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch import distributed as dist

from ganscale.objectives.reconstruction import gaussian_kl, gaussian_nll
from ganscale.training.collectives import sum_over_ranks
from ganscale.training.inputs import LocalBatch


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
    # The mean over dimensions first, so features and images of any size compare.
    errors = (output.float() - target.float()).square().flatten(1).mean(1)
    squared_error = errors.sum() * batch.loss_weight
    # The variance is a constant to the gradient. That loses nothing: at the value that maximises
    # the likelihood the derivative by the variance is zero. It is that of the global batch, or
    # ranks would weigh their samples differently.
    variance = sum_over_ranks(squared_error.detach()) / dist.get_world_size()
    return Likelihood(gaussian_nll(squared_error, variance), squared_error)


def posterior_kl(batch: LocalBatch, mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of the posterior from the prior in nats per image, (); its mean over ranks is global."""
    return gaussian_kl(mean, log_variance).sum() * batch.loss_weight
