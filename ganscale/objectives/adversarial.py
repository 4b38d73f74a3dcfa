"""Adversarial objectives on logits, one value per sample; the step reduces them.

Goodfellow et al. (2014, arXiv 1406.2661), with D = sigmoid(logit):

    discriminator              -log D(x) - log(1 - D(G(z)))     (equation 1, negated)
    minimax generator           log(1 - D(G(z)))                (equation 1)
    nonsaturating generator    -log D(G(z))                     (section 3, last paragraph)

Mao et al. (2017, arXiv 1611.04076), least squares with a = 0, b = c = 1 (equation 9), logits C:

    discriminator               (C(x) - 1)^2 / 2 + C(G(z))^2 / 2
    generator                   (C(G(z)) - 1)^2 / 2

Lim and Ye (2017, arXiv 1705.02894), hinge:

    discriminator               max(0, 1 - C(x)) + max(0, 1 + C(G(z)))
    generator                  -C(G(z))

Jolicoeur-Martineau (2018, arXiv 1807.00734), relativistic pairing, with f = -log sigmoid:

    discriminator               f(C(x) - C(G(z)))               (equation 4)
    generator                   f(C(G(z)) - C(x))               (equation 5)

and the same with each logit compared to the mean of the other side's (equations 10 and 11):

    relativistic average        f(C(x) - E C(G(z))) + f(E C(x) - C(G(z))), sides swapped for G

Arjovsky et al. (2017, arXiv 1701.07875), Wasserstein, equation 3:

    discriminator               C(G(z)) - C(x)
    generator                  -C(G(z))

Cross-entropies are in the softplus form, softplus(t) = log(1 + exp(t)), which neither overflows
nor saturates. Logits come in any precision and are compared in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu, softplus


@dataclass(frozen=True)
class Objective:
    """A pair of losses on (real_logits, fake_logits); logits and results have shape (N,).

    Real and fake logits of one place in the batch are a pair. Most generators do not look at real
    logits and are given None.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor | None, Tensor], Tensor]
    # Asked for by name, so that the others are spared a forward of real images.
    generator_sees_real: bool = False
    centred: bool = False
    """Logits are given minus the mean of the other side's over the global batch."""
    bounded: bool = False
    """The discriminator's loss no longer falls once logits lie far apart, so that logits which lie
    very far apart are a sign of trouble to the guard."""


def _cross_entropy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return softplus(-real_logits.float()) + softplus(fake_logits.float())


def _nonsaturating_generator(_: Tensor | None, fake_logits: Tensor) -> Tensor:
    return softplus(-fake_logits.float())


def _minimax_generator(_: Tensor | None, fake_logits: Tensor) -> Tensor:
    # Saturates: the gradient is sigmoid(logit), which vanishes where the discriminator is sure.
    # Included because it is the paper's objective; use `nonsaturating` in practice.
    return -softplus(fake_logits.float())


def _least_squares(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return ((real_logits.float() - 1).square() + fake_logits.float().square()) / 2


def _least_squares_generator(_: Tensor | None, fake_logits: Tensor) -> Tensor:
    return (fake_logits.float() - 1).square() / 2


def _hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return relu(1 - real_logits.float()) + relu(1 + fake_logits.float())


def _wasserstein(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return fake_logits.float() - real_logits.float()


def _minus_logits_generator(_: Tensor | None, fake_logits: Tensor) -> Tensor:
    # No margin for the generator: beyond one it would get no gradient from its best images.
    return -fake_logits.float()


def _relativistic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    # Real and fake samples are drawn independently, so any pairing is a sample of the expectation;
    # pairs of one place in the batch have the same label too.
    return softplus(fake_logits.float() - real_logits.float())


def _relativistic_generator(real_logits: Tensor | None, fake_logits: Tensor) -> Tensor:
    assert real_logits is not None
    return softplus(real_logits.float() - fake_logits.float())


def _swapped_cross_entropy(real_logits: Tensor | None, fake_logits: Tensor) -> Tensor:
    assert real_logits is not None
    # Both terms depend on the generator here, since each side's mean enters the other's.
    return _cross_entropy(fake_logits, real_logits)


OBJECTIVES = {
    "nonsaturating": Objective(_cross_entropy, _nonsaturating_generator, bounded=True),
    "minimax": Objective(_cross_entropy, _minimax_generator, bounded=True),
    "least_squares": Objective(_least_squares, _least_squares_generator),
    "hinge": Objective(_hinge, _minus_logits_generator, bounded=True),
    "wasserstein": Objective(_wasserstein, _minus_logits_generator),
    "relativistic": Objective(
        _relativistic, _relativistic_generator, generator_sees_real=True, bounded=True
    ),
    "relativistic_average": Objective(
        _cross_entropy, _swapped_cross_entropy, generator_sees_real=True, centred=True, bounded=True
    ),
}
