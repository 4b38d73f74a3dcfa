"""Convolutions against PyTorch's own, to the second derivative and beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.convolution import Conv2d, conv2d, conv_transpose2d

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Any, dict[str, int]]] = {
    "plain": (conv2d, F.conv2d, (6, 4, 3, 3), {"padding": 1}),
    "1x1": (conv2d, F.conv2d, (6, 4, 1, 1), {}),
    "no padding": (conv2d, F.conv2d, (6, 4, 4, 4), {}),
    "strided": (conv2d, F.conv2d, (6, 4, 4, 4), {"stride": 2, "padding": 1}),
    "strided, a column left over": (conv2d, F.conv2d, (6, 4, 3, 3), {"stride": 2}),
    "grouped": (conv2d, F.conv2d, (6, 2, 3, 3), {"padding": 1, "groups": 2}),
    "depthwise": (conv2d, F.conv2d, (4, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 4}),
    "transposed": (
        conv_transpose2d,
        F.conv_transpose2d,
        (4, 6, 4, 4),
        {"stride": 2, "padding": 1},
    ),
    "transposed, grouped": (
        conv_transpose2d,
        F.conv_transpose2d,
        (4, 3, 4, 4),
        {"stride": 2, "padding": 1, "groups": 2},
    ),
    "transposed, depthwise": (
        conv_transpose2d,
        F.conv_transpose2d,
        (4, 1, 4, 4),
        {"stride": 2, "padding": 1, "groups": 4},
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def arguments(case: str, dtype: torch.dtype, *, side: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, 4, side, side), the weight and the bias of a case; all ask for gradients."""
    ours, _, shape, options = CASES[case]
    out = shape[1] * options.get("groups", 1) if ours is conv_transpose2d else shape[0]
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=dtype).requires_grad_()
        for size in ((2, 4, side, side), shape, (out,))
    )
    return x, weight, bias


def derivatives(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The value, its gradients, and those of R1 and of R1's own squared gradient by everything."""
    y = function(x, *parameters)
    loss = y.square().sum() * y.sum()
    first = torch.autograd.grad(loss, (x, *parameters), create_graph=True)
    r1 = first[0].square().sum()
    second = torch.autograd.grad(r1, (x, *parameters), create_graph=True)
    third = torch.autograd.grad(second[1].square().sum(), (x, parameters[0]))
    return [y, *first, *second, *third]


@each_case
def test_derivatives_of_three_orders_are_pytorchs(case: str) -> None:
    ours, theirs, _, options = CASES[case]
    inputs = arguments(case, torch.float64)
    found = derivatives(lambda *tensors: ours(*tensors, **options), *inputs)
    expected = derivatives(lambda *tensors: theirs(*tensors, **options), *inputs)
    for value, other in zip(found, expected, strict=True):
        atol = 1e-12 * float(other.detach().abs().max())
        torch.testing.assert_close(value, other, rtol=1e-12, atol=atol)


@each_case
def test_value_and_first_derivatives_have_pytorchs_bits(case: str) -> None:
    ours, theirs, _, options = CASES[case]
    inputs = arguments(case, torch.float32)
    results = []
    for function in (ours, theirs):
        y = function(*inputs, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs[:2])])
    for value, other in zip(*results, strict=True):
        assert torch.equal(value, other)


@each_case
def test_gradcheck_of_both_orders(case: str) -> None:
    ours, _, _, options = CASES[case]
    inputs = arguments(case, torch.float64, side=4)
    function = lambda *tensors: ours(*tensors, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_case
def test_autocast_casts_as_it_does_for_pytorchs(case: str, dtype: torch.dtype) -> None:
    ours, theirs, _, options = CASES[case]
    inputs = arguments(case, torch.float32)
    results = []
    for function in (ours, theirs):
        with torch.autocast("cpu", dtype=dtype):
            y = function(*inputs, **options)
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for value, other in zip(*results, strict=True):
        assert torch.equal(value, other)


def test_a_penalty_in_autocast_is_near_that_of_fp32() -> None:
    inputs = arguments("grouped", torch.float32)
    options = CASES["grouped"][3]

    def penalty_gradient(enabled: bool) -> Tensor:
        x, weight, bias = inputs
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = conv2d(x, weight, bias, **options).float().tanh().sum()
            (slope,) = torch.autograd.grad(logits, x, create_graph=True)
        (gradient,) = torch.autograd.grad(slope.float().square().sum(), weight)
        return gradient

    expected = penalty_gradient(False)
    torch.testing.assert_close(
        penalty_gradient(True), expected, rtol=0, atol=0.03 * float(expected.abs().max())
    )


def test_the_module_is_pytorchs() -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    ours = Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(ours(x), theirs(x))


def test_the_memory_format_is_kept() -> None:
    x, weight, _ = arguments("plain", torch.float32)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv2d(x, weight, padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert slope.is_contiguous(memory_format=torch.channels_last)
