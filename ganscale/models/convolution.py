"""Convolutions whose derivatives of any order cost what convolutions cost.

PyTorch differentiates the backward of a convolution by a formula that loops over its groups: on an
H100 the second derivative of a 3x3 in 96 groups takes 30 ms where the first takes 0.7. That is what
R1, R2 and gradient penalties wait for. But a convolution y = C(x, w) is linear in x and in w, so
with its two adjoints

    I(g, w), the gradient by the input, and W(g, x), the gradient by the weight,
    <g, C(x, w)> = <I(g, w), x> = <W(g, x), w>,

the derivatives of each of the three are the other two. First derivatives have the bits of
PyTorch's; higher ones are the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ganscale.models.input_gradients import are_parameters_wanted


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """As `torch.nn.functional.conv2d`: x (N, I, H, W), weight (O, I / groups, K, K), bias (O,)."""
    return _convolve(x, weight, bias, _Geometry(stride, padding, False, groups))


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """As `torch.nn.functional.conv_transpose2d`; its weight is (I, O / groups, K, K)."""
    return _convolve(x, weight, bias, _Geometry(stride, padding, True, groups))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with an integer stride and padding, by `conv2d` of this module.

    With `adds_bias=False` it only owns its bias, for `bias_leaky_relu` to add.
    """

    def __init__(self, *arguments: Any, adds_bias: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.adds_bias = adds_bias

    def forward(self, x: Tensor) -> Tensor:
        (stride, _), (padding, _) = self.stride, cast(tuple[int, int], self.padding)
        bias = self.bias if self.adds_bias else None
        return conv2d(x, self.weight, bias, stride=stride, padding=padding, groups=self.groups)


@dataclass(frozen=True)
class _Geometry:
    """The arguments of a convolution that are not tensors; the same on both axes."""

    stride: int
    padding: int
    transposed: bool
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of `aten.convolution`; no dilation, and no padding of the output."""
        stride, padding = [self.stride, self.stride], [self.padding, self.padding]
        return stride, padding, [1, 1], self.transposed, [0, 0], self.groups

    def adjoints(
        self, gradient: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """I(g, w) and W(g, x), those that `mask` names; of what is not needed only the shape."""
        by_input, by_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *self.arguments, [*mask, False]
        )
        return by_input, by_weight


class _Convolution(torch.autograd.Function):
    """C(x, w) + b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, *geometry.arguments)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, _ = ctx.needs_input_grad
        if not are_parameters_wanted():
            by_weight = by_bias = False
        return (
            _InputGradient.apply(gradient, x, weight, ctx.geometry) if by_x else None,
            _WeightGradient.apply(gradient, x, weight, ctx.geometry) if by_weight else None,
            gradient.sum((0, 2, 3)) if by_bias else None,
            None,
        )


class _InputGradient(torch.autograd.Function):
    """I(g, w); of `x` it needs the shape alone, so there is no gradient by x."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry
    ) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.geometry = geometry
        return geometry.adjoints(gradient, x, weight, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = gradients
        gradient, weight = ctx.saved_tensors
        by_gradient, _, by_weight, _ = ctx.needs_input_grad
        return (
            _Convolution.apply(v, weight, None, ctx.geometry) if by_gradient else None,
            None,
            _WeightGradient.apply(gradient, v, weight, ctx.geometry) if by_weight else None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """W(g, x); of `weight` it needs the shape alone, so there is no gradient by it."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry
    ) -> Tensor:
        ctx.save_for_backward(gradient, x)
        ctx.geometry = geometry
        return geometry.adjoints(gradient, x, weight, (False, True))[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = gradients
        gradient, x = ctx.saved_tensors
        by_gradient, by_x, _, _ = ctx.needs_input_grad
        return (
            _Convolution.apply(x, v, None, ctx.geometry) if by_gradient else None,
            _InputGradient.apply(gradient, x, v, ctx.geometry) if by_x else None,
            None,
            None,
        )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    # Autocast casts what it knows by name, and a Function it does not know.
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = _Convolution.apply(x, weight, bias, geometry)
    return y
