"""Penalties on the discriminator: functions of its images and logits, one value per sample.

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

LogitsFn = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) to logits (n,), through the augmentation, with the images' condition."""

DRAGAN_STD = 0.25
"""c: half the standard deviation of the pixels of natural images in [-1, 1]."""
FINITE_DIFFERENCE_STEP = 0.01
"""s, in units of pixels in [-1, 1]. bf16 is too coarse for it: the difference of two logits is
divided by s, and with it their rounding."""


@dataclass(frozen=True)
class PenaltyInputs:
    """The discriminator's phase as a penalty sees it: images, their logits, a way to get more."""

    real_logits_fn: LogitsFn
    fake_logits_fn: LogitsFn
    real_images: Tensor
    """(n, C, H, W) in [-1, 1]; requires a gradient if one of the penalties asks for it."""
    fake_images: Tensor
    real_logits: Tensor
    """(n,)"""
    fake_logits: Tensor
    noise: Mapping[str, Tensor]
    """Random numbers by purpose, those that the penalties in use name."""
    inner_scale: float = 1.0
    """What logits are multiplied by while their gradient by the images is taken."""
    perturb: Callable[[Tensor], Tensor] = lambda images: images
    """Flips and shifts images, for `consistency`."""
    anchors: Tensor | None = None
    """Running means of real and fake logits, (2,), for `lecam`."""


@dataclass(frozen=True)
class Penalty:
    """A penalty (n,), the images it differentiates the logits by, and the noise that it needs."""

    value: Callable[[PenaltyInputs], Tensor]
    real_gradient: bool = False
    fake_gradient: bool = False
    pixel_noise: str = ""
    """Purpose of N(0, 1) noise with the shape of the images; empty for none."""
    image_noise: str = ""
    """Purpose of uniform noise, one number an image, (n, 1, 1, 1); empty for none."""


def input_gradient(logits: Tensor, images: Tensor, scale: float = 1.0) -> Tensor:
    """d logits / d images, (n, C, H, W), in fp32 or wider, differentiable in its turn.

    A logit must depend on its own image alone for this to be each sample's gradient.
    """
    scaled: Tensor
    # The sum's gradient by one image is that of its own logit, if logits do not mix samples. The
    # graph is kept, since the penalty is differentiated by the weights in its turn.
    (scaled,) = torch.autograd.grad((logits * scale).sum(), images, create_graph=True)
    # fp32 before the division: that is what brings small elements back, and they would be lost
    # again in half precision.
    return _wide(scaled) / scale


def gradient_normalised(logits_fn: LogitsFn, scale: float = 1.0) -> LogitsFn:
    """D(x) / (||grad D(x)|| + |D(x)|): Wu et al. (2021, arXiv 2109.02235), equation 9."""

    def normalised(images: Tensor) -> Tensor:
        # Fakes in the generator's phase carry a graph, through which the gradient has to reach the
        # generator; real images and constants become leaves.
        if not images.requires_grad:
            images = images.detach().requires_grad_()
        logits = logits_fn(images)
        norm = _norm(input_gradient(logits, images, scale))
        return _wide(logits) / (norm + _wide(logits).abs())

    return normalised


def orthogonal_penalty(module: nn.Module) -> Tensor:
    """sum of ||W W^T (1 - I)||_F^2 over the weights of linear layers and convolutions, ().

    Brock et al. (2019, arXiv 1809.11096), equation 3: only what lies off the diagonal. A row of W
    is what makes one output feature.
    """
    total: Tensor = torch.zeros((), device=next(module.parameters()).device)
    for name, layer in module.named_modules():
        # Rows of a class embedding are no filters of one layer; BigGAN's published code leaves it
        # out too.
        if isinstance(layer, nn.Embedding) or "embedding" in name:
            continue
        weight = _weight_to_penalise(layer)
        # The gains of a norm have no rows to compare.
        if weight is None or weight.ndim < 2:
            continue
        # A transposed convolution has its outputs second.
        has_outputs_second = isinstance(layer, nn.ConvTranspose2d)
        rows = (weight.transpose(0, 1) if has_outputs_second else weight).flatten(1)
        products = rows @ rows.T
        # Off the diagonal alone: filters are to be orthogonal, not of norm 1, which limits them too
        # much (the paper's section 3.1).
        total += products.square().sum() - products.diagonal().square().sum()
    return total


def _weight_to_penalise(layer: nn.Module) -> Tensor | None:
    """The layer's weight, before spectral norm where it has that; None of a layer without one."""
    weight: object = None
    if is_parametrized(layer, "weight"):
        # Spectral norm divides a weight that the optimizer moves, "original". Weight norm has none:
        # it multiplies a length and a direction, and their product is the weight.
        parametrizations: Any = layer.parametrizations
        weight = getattr(parametrizations.weight, "original", None)
    if weight is None:
        weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _r1(inputs: PenaltyInputs) -> Tensor:
    return _half_squared_gradient(inputs.real_logits, inputs.real_images, inputs.inner_scale)


def _r2(inputs: PenaltyInputs) -> Tensor:
    return _half_squared_gradient(inputs.fake_logits, inputs.fake_images, inputs.inner_scale)


def _r1_finite_difference(inputs: PenaltyInputs) -> Tensor:
    u = inputs.noise["r1"]
    return _half_squared_slope(inputs.real_logits_fn, inputs.real_images, inputs.real_logits, u)


def _r2_finite_difference(inputs: PenaltyInputs) -> Tensor:
    u = inputs.noise["r2"]
    return _half_squared_slope(inputs.fake_logits_fn, inputs.fake_images, inputs.fake_logits, u)


def _wgan_gp(inputs: PenaltyInputs) -> Tensor:
    real, fake = inputs.real_images.detach(), inputs.fake_images.detach()
    # One number an image, so x^ is on the straight line between a real and a fake image.
    between = torch.lerp(real, fake, inputs.noise["wgan_gp"])
    return _distance_from_unit_slope(inputs, between)


def _dragan(inputs: PenaltyInputs) -> Tensor:
    noise = DRAGAN_STD * inputs.noise["dragan"]
    return _distance_from_unit_slope(inputs, inputs.real_images.detach() + noise)


def _consistency(inputs: PenaltyInputs) -> Tensor:
    # The same rows of augmentation for both, so that only the perturbation makes them differ.
    perturbed = inputs.real_logits_fn(inputs.perturb(inputs.real_images.detach()))
    return (_wide(inputs.real_logits) - _wide(perturbed)).square()


def _lecam(inputs: PenaltyInputs) -> Tensor:
    assert inputs.anchors is not None
    # Crosswise: real logits are held near the mean of fake ones, and the other way round.
    real = (_wide(inputs.real_logits) - inputs.anchors[1]).square()
    fake = (_wide(inputs.fake_logits) - inputs.anchors[0]).square()
    return real + fake


def _half_squared_gradient(logits: Tensor, images: Tensor, scale: float) -> Tensor:
    return input_gradient(logits, images, scale).square().sum(dim=(1, 2, 3)) / 2


def _half_squared_slope(logits_fn: LogitsFn, images: Tensor, logits: Tensor, u: Tensor) -> Tensor:
    # The unmoved logits are those of the loss, so this costs one forward and one backward more, and
    # no gradient of a gradient. E (u . g)^2 = ||g||^2 for u ~ N(0, 1).
    moved = logits_fn(images.detach() + FINITE_DIFFERENCE_STEP * u)
    slope = (_wide(moved) - _wide(logits)) / FINITE_DIFFERENCE_STEP
    return slope.square() / 2


def _distance_from_unit_slope(inputs: PenaltyInputs, images: Tensor) -> Tensor:
    # A tensor made for this, between or beside the batch's images: a leaf of its own. It is judged
    # with the condition and the augmentation of the real image of its place.
    images.requires_grad_()
    gradient = input_gradient(inputs.real_logits_fn(images), images, inputs.inner_scale)
    return (_norm(gradient) - 1).square()


def _norm(gradient: Tensor) -> Tensor:
    """L2 norm of each sample, (n,); its own gradient at zero is finite."""
    # The root has an infinite slope at 0, and a dead discriminator has such gradients.
    return (gradient.square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()


def _wide(values: Tensor) -> Tensor:
    # float64 passes, so that tests can compare with finite differences.
    return values if values.dtype == torch.float64 else values.float()


PENALTIES = {
    "r1": Penalty(_r1, real_gradient=True),
    "r2": Penalty(_r2, fake_gradient=True),
    "r1_finite_difference": Penalty(_r1_finite_difference, pixel_noise="r1"),
    "r2_finite_difference": Penalty(_r2_finite_difference, pixel_noise="r2"),
    "wgan_gp": Penalty(_wgan_gp, image_noise="wgan_gp"),
    "dragan": Penalty(_dragan, pixel_noise="dragan"),
    "consistency": Penalty(_consistency),
    "lecam": Penalty(_lecam),
}
