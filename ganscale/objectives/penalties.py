"""Penalties on the discriminator: functions of what it saw, one value per sample.

Squared gradients are those of the logit with respect to the image before augmentation:

    r1, r2      1/2 ||grad D(x)||^2 at real and at fake images (Mescheder et al. 2018, arXiv
                1801.04406, equations 9 and 10)
    wgan_gp     (||grad D(x^)|| - 1)^2, x^ between a real and a fake image (Gulrajani et al. 2017,
                arXiv 1704.00028, equation 3)
    dragan      (||grad D(x + d)|| - 1)^2, d ~ N(0, c^2) (Kodali et al. 2017, arXiv 1705.07215)

and without gradients of gradients:

    r1, r2 by finite difference    1/2 ((D(x + s u) - D(x)) / s)^2, u ~ N(0, 1), whose mean over u
                                   is r1 up to terms in s^2 (Lin et al. 2025, arXiv 2501.08316)
    consistency                    (D(x) - D(T(x)))^2 for flips and shifts T (Zhang et al. 2020,
                                   arXiv 1910.12027, equation 3)
    lecam                          (D(x) - a_F)^2 + (D(G(z)) - a_R)^2 with running means a of the
                                   other side's logits (Tseng et al. 2021, arXiv 2104.03310,
                                   equation 6)

Under fp16 the inner gradient is taken of a scaled logit and divided by the scale again in fp32
before it is squared: neither its small elements nor its square leave the range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "PENALTIES",
    "Judge",
    "Penalty",
    "Played",
    "Randomness",
    "gradient_normalised",
    "input_gradient",
    "orthogonal_penalty",
]

Judge = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) to logits (n,), through the augmentation, with the labels."""

DRAGAN_STD = 0.25
"""c: half the standard deviation of the pixels of natural images in [-1, 1]."""
FINITE_DIFFERENCE_STEP = 0.01
"""s, in units of pixels in [-1, 1]."""


class Randomness(Protocol):
    """Random numbers for this rank's samples, decided by the position and the purpose."""

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """N(0, 1), (n, *shape)."""
        ...

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """In [0, 1), (n, *shape)."""
        ...


@dataclass(frozen=True)
class Played:
    """What the discriminator saw in this phase, and how to ask it again."""

    judge_real: Judge
    judge_fake: Judge
    real_images: Tensor
    fake_images: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    random: Randomness
    inner_scale: float = 1.0
    """Of the logits in inner gradients."""
    perturb: Judge = lambda images: images
    """Flips and shifts images, for `consistency`."""
    anchors: Tensor | None = None
    """Running means of real and fake logits, (2,), for `lecam`."""


@dataclass(frozen=True)
class Penalty:
    """A penalty (n,) and which images it differentiates the logits by."""

    value: Callable[[Played], Tensor]
    real_gradient: bool = False
    fake_gradient: bool = False


def input_gradient(logits: Tensor, images: Tensor, scale: float = 1.0) -> Tensor:
    """d logits / d images, (n, C, H, W), in fp32 or wider, differentiable in its turn.

    A logit must depend on its own image alone for this to be each sample's gradient.
    """
    scaled: Tensor
    (scaled,) = torch.autograd.grad((logits * scale).sum(), images, create_graph=True)
    return _wide(scaled) / scale


def gradient_normalised(judge: Judge, scale: float = 1.0) -> Judge:
    """D(x) / (||grad D(x)|| + |D(x)|): Wu et al. (2021, arXiv 2109.02235), equation 9."""

    def normalised(images: Tensor) -> Tensor:
        if not images.requires_grad:
            images = images.detach().requires_grad_()
        logits = judge(images)
        norm = _norm(input_gradient(logits, images, scale))
        return _wide(logits) / (norm + _wide(logits).abs())

    return normalised


def orthogonal_penalty(parameters: Mapping[str, Tensor]) -> Tensor:
    """sum of ||W W^T (1 - I)||_F^2 over all matrices and filter banks, ().

    Brock et al. (2019, arXiv 1809.11096), equation 3: only what lies off the diagonal.
    """
    total: Tensor = torch.zeros((), device=next(iter(parameters.values())).device)
    for name, weight in parameters.items():
        if weight.ndim < 2 or "embedding" in name:
            continue
        rows = weight.flatten(1)
        products = rows @ rows.T
        total += products.square().sum() - products.diagonal().square().sum()
    return total


def _r1(played: Played) -> Tensor:
    return _half_squared_gradient(played.real_logits, played.real_images, played.inner_scale)


def _r2(played: Played) -> Tensor:
    return _half_squared_gradient(played.fake_logits, played.fake_images, played.inner_scale)


def _r1_finite_difference(played: Played) -> Tensor:
    u = played.random.normal("r1", *played.real_images.shape[1:])
    return _half_squared_slope(played.judge_real, played.real_images, played.real_logits, u)


def _r2_finite_difference(played: Played) -> Tensor:
    u = played.random.normal("r2", *played.fake_images.shape[1:])
    return _half_squared_slope(played.judge_fake, played.fake_images, played.fake_logits, u)


def _wgan_gp(played: Played) -> Tensor:
    share = played.random.uniform("wgan_gp", 1, 1, 1)
    between = torch.lerp(played.real_images.detach(), played.fake_images.detach(), share)
    return _distance_from_unit_slope(played, between)


def _dragan(played: Played) -> Tensor:
    noise = DRAGAN_STD * played.random.normal("dragan", *played.real_images.shape[1:])
    return _distance_from_unit_slope(played, played.real_images.detach() + noise)


def _consistency(played: Played) -> Tensor:
    perturbed = played.judge_real(played.perturb(played.real_images.detach()))
    return (_wide(played.real_logits) - _wide(perturbed)).square()


def _lecam(played: Played) -> Tensor:
    assert played.anchors is not None
    real = (_wide(played.real_logits) - played.anchors[1]).square()
    fake = (_wide(played.fake_logits) - played.anchors[0]).square()
    return real + fake


def _half_squared_gradient(logits: Tensor, images: Tensor, scale: float) -> Tensor:
    return input_gradient(logits, images, scale).square().sum(dim=(1, 2, 3)) / 2


def _half_squared_slope(judge: Judge, images: Tensor, logits: Tensor, u: Tensor) -> Tensor:
    moved = judge(images.detach() + FINITE_DIFFERENCE_STEP * u)
    slope = (_wide(moved) - _wide(logits)) / FINITE_DIFFERENCE_STEP
    return slope.square() / 2


def _distance_from_unit_slope(played: Played, images: Tensor) -> Tensor:
    images.requires_grad_()
    gradient = input_gradient(played.judge_real(images), images, played.inner_scale)
    return (_norm(gradient) - 1).square()


def _norm(gradient: Tensor) -> Tensor:
    """L2 norm of each sample, (n,); its own gradient at zero is finite."""
    return (gradient.square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


PENALTIES = {
    "r1": Penalty(_r1, real_gradient=True),
    "r2": Penalty(_r2, fake_gradient=True),
    "r1_finite_difference": Penalty(_r1_finite_difference),
    "r2_finite_difference": Penalty(_r2_finite_difference),
    "wgan_gp": Penalty(_wgan_gp),
    "dragan": Penalty(_dragan),
    "consistency": Penalty(_consistency),
    "lecam": Penalty(_lecam),
}
