"""Picking pixels, with an adjoint that has the same bits each time, on every device.

The gradient of a gather is a sum over all the places that read a pixel. On CUDA the threads of such
a sum finish in any order, so PyTorch's deterministic form sorts the indices first, which took 32 ms
of a step of 133 on an H100. Whole numbers can be added in any order, so here the values are rounded
to multiples of a power of two, small against fp32's own rounding, and summed as int64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BITS = 46
"""Of an image and channel's largest value; a sum of up to 65,536 of them then fits into 63 bits."""


def gather_pixels(images: Tensor, index: Tensor) -> Tensor:
    """Pixels (n, C, m) of flat images (n, C, k) at places `index` (n, m) int64.

    Differentiable to any order.
    """
    pixels: Tensor = _Gather.apply(images, index.unsqueeze(1).expand(-1, images.shape[1], -1))
    return pixels


class _Gather(torch.autograd.Function):
    """The values at an index (n, C, m)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_pixels = images.shape[2]
        return images.gather(2, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _ScatterSum.apply(gradients[0], index, ctx.num_pixels), None


class _ScatterSum(torch.autograd.Function):
    """The adjoint of `_Gather`: the sum of the values that read each pixel."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, num_pixels: int) -> Tensor:
        ctx.save_for_backward(index)
        if values.is_cuda:
            return sum_in_fixed_point(values, index, num_pixels)
        # On the CPU a row belongs to one thread, so its order is fixed, and floats are faster.
        return values.new_zeros((*values.shape[:2], num_pixels)).scatter_add_(2, index, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Gather.apply(gradients[0], index), None, None


def sum_in_fixed_point(values: Tensor, index: Tensor, num_pixels: int) -> Tensor:
    """Sums (n, C, k) of the values (n, C, m) by their places `index` (n, C, m), in any order.

    Each value is rounded to a multiple of 2^-46 of its image and channel's largest one, so the sum
    is closer to the exact one than a sum in fp32. A value that is not finite makes its channel nan.
    """
    largest = values.abs().amax(2, keepdim=True)
    # A power of two, so that scaling itself rounds nothing.
    scale = torch.exp2((_BITS - torch.frexp(largest).exponent).double())
    whole = (values * scale).round_().long()
    total = torch.zeros((*values.shape[:2], num_pixels), dtype=torch.int64, device=values.device)
    # Told to be deterministic, CUDA would sort even integers, whose sum needs no order.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        total.scatter_add_(2, index, whole)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return (total / scale + (largest - largest)).to(values.dtype)
