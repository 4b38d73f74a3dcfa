"""Fused operations against the operations of PyTorch that they stand for, to three derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ganscale.models.fused import bias_leaky_relu, scaled_sum
from ganscale.models.input_gradients import input_gradients_only

SHAPES: dict[str, tuple[int, ...]] = {"map": (3, 4, 5, 5), "vector": (3, 4), "empty": (0, 4, 5, 5)}
FORMS: dict[str, dict[str, Any]] = {
    "leaky ReLU": {"slope": 0.2},
    "gain": {"slope": 0.2, "gain": 2**0.5},
    "gain and limit": {"slope": 0.2, "gain": 2**0.5, "limit": 1.0},
}
each_form = pytest.mark.parametrize("form", FORMS)


def composed(
    x: Tensor,
    bias: Tensor | None,
    slope: float,
    *,
    gain: float = 1.0,
    limit: float | None = None,
) -> Tensor:
    """The same of PyTorch's operations, one after the other."""
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    y = F.leaky_relu(x, slope) * gain
    return y if limit is None else y.clamp(-limit, limit)


def arguments(dtype: torch.dtype, shape: str = "map") -> tuple[Tensor, Tensor]:
    """x and a bias; both ask for gradients, and no sum is within 0.01 of a kink."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64)
    bias = torch.tensor([0.25, -0.5, 0.0, 1.0], dtype=torch.float64)
    total = x + bias.view(-1, *(1,) * (x.ndim - 2))
    for kink in (0.0, 0.5**0.5, -(0.5**0.5) / 0.2):
        x = torch.where((total - kink).abs() < 0.01, x + 0.05, x)
    return x.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()


def derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value; its gradients; those of their squares, as R1's; and of these in their turn."""
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    first = torch.autograd.grad((y**3 * weights).sum(), inputs, create_graph=True)
    squares = sum((gradient.square().sum() for gradient in first), y.new_zeros(()))
    second = torch.autograd.grad(squares, inputs, create_graph=True)
    squares = sum((gradient.square().sum() for gradient in second), y.new_zeros(()))
    return [y, *first, *second, *torch.autograd.grad(squares, inputs)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@each_form
def test_derivatives_of_three_orders_are_the_compositions(
    form: str, shape: str, has_bias: bool
) -> None:
    x, bias = arguments(torch.float64, shape)
    inputs = (x, bias) if has_bias else (x,)
    found, expected = (
        derivatives(lambda x, bias=None, f=f: f(x, bias, **FORMS[form]), inputs)
        for f in (bias_leaky_relu, composed)
    )
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)


@each_form
def test_gradcheck_of_both_orders(form: str) -> None:
    function = lambda x, bias: bias_leaky_relu(x, bias, **FORMS[form])  # noqa: E731
    inputs = arguments(torch.float64)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_form
def test_values_and_gradients_have_the_bits_of_the_composition(
    form: str, dtype: torch.dtype
) -> None:
    x, bias = arguments(dtype)
    bias = bias.detach().float().requires_grad_()  # as parameters are under every precision
    results = []
    for function in (bias_leaky_relu, composed):
        y = function(x, bias, **FORMS[form])
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, bias))])
    for value, other in zip(*results, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_penalty_under_autocast_is_near_that_of_fp32(dtype: torch.dtype) -> None:
    x, bias = (tensor.detach().float().requires_grad_() for tensor in arguments(torch.float64))
    weight = torch.eye(4)[:, :, None, None].requires_grad_()

    def penalty_gradients(enabled: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y = bias_leaky_relu(F.conv2d(x, weight), bias, **FORMS["gain and limit"])
            (slope,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.float().square().sum(), (weight, bias))

    for value, other in zip(penalty_gradients(True), penalty_gradients(False), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0.03 * float(other.abs().max()))


@each_form
def test_only_the_result_is_saved(form: str) -> None:
    x, bias = arguments(torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = bias_leaky_relu(x, bias, **FORMS[form])
    assert [tensor.data_ptr() for tensor in saved] == [y.data_ptr()]


@each_form
def test_what_is_not_finite_stays_so(form: str) -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf]], requires_grad=True)
    y = bias_leaky_relu(x, None, **FORMS[form])
    torch.testing.assert_close(y, composed(x, None, **FORMS[form]), equal_nan=True)
    gradient = torch.tensor([[1.0, torch.inf, torch.nan]])
    x = torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    bias_leaky_relu(x, None, **FORMS[form]).backward(gradient)
    assert x.grad is not None
    assert x.grad.isfinite().tolist() == [[True, False, False]]


def test_the_memory_format_is_kept_and_the_input_left_alone() -> None:
    x, bias = arguments(torch.float32)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    y = bias_leaky_relu(x, bias, **FORMS["gain and limit"])
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for value in (y, slope):
        assert value.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


def test_a_limit_that_half_precision_does_not_have_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="power of two"):
        bias_leaky_relu(torch.ones(1, 1), None, 0.2, limit=0.9)


def test_the_bias_gets_no_gradient_where_only_the_images_is_asked_for() -> None:
    x, bias = arguments(torch.float64)
    y = bias_leaky_relu(x, bias, 0.2).square().sum()
    with input_gradients_only():
        by_x, by_bias = torch.autograd.grad(y, (x, bias), retain_graph=True, allow_unused=True)
    assert by_bias is None
    assert torch.equal(by_x, torch.autograd.grad(y, x)[0])


def test_a_scaled_sum_is_the_compositions() -> None:
    x, _ = arguments(torch.float64)
    y = x.detach().flip(0).requires_grad_()
    found = derivatives(lambda x, y: scaled_sum(x, y, 2**0.5), (x, y))
    expected = derivatives(lambda x, y: (x + y) / 2**0.5, (x, y))
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)
