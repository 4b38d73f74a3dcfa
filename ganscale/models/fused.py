"""Operations on feature maps in one pass, whose derivatives of any order are one pass as well.

Bias and activation are one operation here,

    y = clamp(gain leaky_relu(x + b)),

linear wherever it has a derivative. With its slopes m at the places of x, each gain, gain * slope
or, beyond the limit, 0,

    L(v, c) = m (v + c), with v as x and c as b,    and its adjoint    A(g) = (m g, sum of m g),

where the sum is over all but the channels, the derivative of y is A, that of A is L, and that of L
is A again. The slopes are those that y shows, since a leaky ReLU keeps signs. So y is all that is
saved, which the next layer keeps anyway; PyTorch's own operations save their inputs beside it. Nor
is a map of zeros made and added for the derivative by x of the slopes, as PyTorch does in a second
derivative. Where |y| is the limit itself the slope is 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from ganscale.models.elementwise import elementwise
from ganscale.models.input_gradients import are_parameters_wanted


class _Shape(NamedTuple):
    """The constants of an activation."""

    slope: float
    gain: float
    limit: float | None


def bias_leaky_relu(
    x: Tensor,
    bias: Tensor | None,
    slope: float,
    *,
    gain: float = 1.0,
    limit: float | None = None,
) -> Tensor:
    """gain * leaky_relu(x + bias), clamped to [-limit, limit].

    x is (N, C, ...), `bias` has C elements, `slope` is in (0, 1), `gain` is positive and `limit` a
    power of two. The result has the type of x, which the bias is rounded to.
    """
    # What is beyond the limit is told by its result, so every precision has to have the limit.
    assert limit is None or math.frexp(limit)[0] == 0.5, "not a power of two"
    if bias is not None:
        bias = bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    y: Tensor = _BiasActivation.apply(x, bias, _Shape(slope, gain, limit))
    return y


def scaled_sum(x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """(x + y) / divisor, of tensors of one shape."""
    result: Tensor = _ScaledSum.apply(x, y, divisor)
    return result


class _BiasActivation(torch.autograd.Function):
    """y of x and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
        y = _activated(x, bias, *shape)
        ctx.save_for_backward(y)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        by_bias = ctx.needs_input_grad[1] and are_parameters_wanted()
        return (*_Adjoint.apply(gradients[0], y, by_bias, ctx.shape), None)


class _Adjoint(torch.autograd.Function):
    """A(g), with None for the sum unless it is wanted; y, which tells the slopes, is a constant."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, y: Tensor, by_bias: bool, shape: _Shape
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        ctx.shape = shape
        by_x = _scaled(gradient, None, y, *shape)
        if not by_bias:
            return by_x, None
        channels = (1, -1, *(1,) * (y.ndim - 2))
        others = [axis for axis in range(y.ndim) if axis != 1]
        return by_x, by_x.sum(others).view(channels[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        v, c = gradients
        if v is None and c is not None:
            v = torch.zeros_like(y)
        if v is None:
            return None, None, None, None
        return _Linear.apply(v, c, y, ctx.shape), None, None, None


class _Linear(torch.autograd.Function):
    """L(v, c)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, c: Tensor | None, y: Tensor, shape: _Shape) -> Tensor:
        ctx.save_for_backward(y)
        ctx.shape = shape
        return _scaled(v, c, y, *shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return (*_Adjoint.apply(gradients[0], y, ctx.needs_input_grad[1], ctx.shape), None, None)


class _ScaledSum(torch.autograd.Function):
    """(x + y) / divisor; its derivatives are of PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return _divided_sum(x, y, divisor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] / ctx.divisor
        return gradient, gradient, None


@elementwise
def _activated(
    x: Tensor, bias: Tensor | None, slope: float, gain: float, limit: float | None
) -> Tensor:
    """gain * leaky_relu(x + bias) within the limit."""
    y = leaky_relu(x, slope) if bias is None else leaky_relu(x + bias, slope, inplace=True)
    if gain != 1:
        y = y.mul_(gain)
    return y if limit is None else y.clamp_(-limit, limit)


@elementwise
def _scaled(
    v: Tensor, c: Tensor | None, y: Tensor, slope: float, gain: float, limit: float | None
) -> Tensor:
    """v + c, times the slopes that y shows."""
    if c is not None:
        v = v + c
    # The backwards of PyTorch's own operations, in whose order it would come to them.
    if limit is not None:
        v = torch.ops.aten.hardtanh_backward(v, y, -limit, limit)
    if gain != 1:
        v = v * gain
    result: Tensor = torch.ops.aten.leaky_relu_backward(v, y, slope, True)
    return result


@elementwise
def _divided_sum(x: Tensor, y: Tensor, divisor: float) -> Tensor:
    return (x + y).div_(divisor)
