"""Batch norm of the global batch against PyTorch's, in one process, to the second derivative."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ganscale.training.batch_statistics import GlobalBatchNorm2d, convert_batch_statistics
from ganscale.world import World, process_group
from tests.support.devices import on_each_device


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def layers(affine: bool, dtype: torch.dtype) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """Ours and PyTorch's, with the same parameters."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(4, affine=affine, dtype=dtype)
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = convert_batch_statistics(nn.BatchNorm2d(4, affine=affine, dtype=dtype))
    assert isinstance(ours, GlobalBatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x = 3 * torch.randn(5, 4, 3, 3, dtype=dtype) + 7
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("affine", [True, False])
@on_each_device
def test_values_gradients_and_running_estimates_are_pytorchs(affine: bool, device: str) -> None:
    results = []
    for layer in layers(affine, torch.float32):
        layer.to(device)
        x = images(torch.float32).detach().to(device).requires_grad_()
        y = layer(x)
        inputs = [x, *layer.parameters()]
        gradients = torch.autograd.grad((y.sin() * y).sum(), inputs)
        results.append([y.detach(), *gradients, *layer.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck_of_both_orders(affine: bool) -> None:
    layer, _ = layers(affine, torch.float64)
    parameters = list(layer.parameters())

    def normalised(x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    inputs = (images(torch.float64), *parameters)
    assert torch.autograd.gradcheck(normalised, inputs)
    assert torch.autograd.gradgradcheck(normalised, inputs)


def test_a_gradient_penalty_is_that_of_pytorchs_layer() -> None:
    results = []
    for layer in layers(True, torch.float64):
        x = images(torch.float64)
        (slope,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_statistics_of_fp32(dtype: torch.dtype) -> None:
    layer, _ = layers(True, torch.float32)
    x = images(torch.float32).detach().to(dtype).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.float().sin().sum(), x)
    assert y.dtype == gradient.dtype == dtype
    wide, _ = layers(True, torch.float32)
    x = x.detach().float().requires_grad_()
    expected = wide(x)
    assert torch.equal(y, expected.to(dtype))
    (wide_gradient,) = torch.autograd.grad(expected.sin().sum(), x)
    torch.testing.assert_close(gradient.float(), wide_gradient, rtol=0.05, atol=0.05)
    assert torch.equal(layer.running_var, wide.running_var)  # type: ignore[arg-type]


def test_what_is_not_finite_does_not_stay_in_the_running_estimates() -> None:
    layer, _ = layers(True, torch.float32)
    before = [value.clone() for value in layer.buffers()]
    x = images(torch.float32).detach()
    x[0, 0, 0, 0] = torch.inf
    assert not layer(x).isfinite().all()
    assert all(map(torch.equal, layer.buffers(), before))
