"""Adversarial objectives on logits, one value per sample; the step reduces them.

With D = sigmoid(logit), Goodfellow et al. (2014, arXiv 1406.2661):

    discriminator         -log D(x) - log(1 - D(G(z)))         (equation 1, negated)
    minimax generator      log(1 - D(G(z)))                    (equation 1)
    nonsaturating generator -log D(G(z))                       (section 3, last paragraph)

All in the softplus form, softplus(t) = log(1 + exp(t)), which neither overflows nor saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["OBJECTIVES", "Objective"]


@dataclass(frozen=True)
class Objective:
    """A pair of losses; logits and results have shape (N,)."""

    discriminator_real: Callable[[Tensor], Tensor]
    discriminator_fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _minus_log_sigmoid(logits: Tensor) -> Tensor:
    return softplus(-logits.float())


def _minus_log_one_minus_sigmoid(logits: Tensor) -> Tensor:
    return softplus(logits.float())


def _minimax_generator(fake_logits: Tensor) -> Tensor:
    return -softplus(fake_logits.float())


OBJECTIVES = {
    "nonsaturating": Objective(
        discriminator_real=_minus_log_sigmoid,
        discriminator_fake=_minus_log_one_minus_sigmoid,
        generator=_minus_log_sigmoid,
    ),
    "minimax": Objective(
        discriminator_real=_minus_log_sigmoid,
        discriminator_fake=_minus_log_one_minus_sigmoid,
        generator=_minimax_generator,
    ),
}
