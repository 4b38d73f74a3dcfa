"""The gather of pixels and its adjoint, in floats and in fixed point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ganscale.augment.gather import gather_pixels, sum_in_fixed_point
from tests.support.devices import on_each_device


def places(n: int, num_pixels: int, num_taken: int) -> Tensor:
    """Random places (n, num_taken); many read the same pixel, some pixels are read by none."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, num_pixels, (n, num_taken), generator=generator)


def test_gradcheck_of_both_orders() -> None:
    index = places(2, 5, 9)
    images = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_pixels(x, index), images)
    assert torch.autograd.gradgradcheck(lambda x: gather_pixels(x, index) ** 3, images)


@on_each_device
def test_derivatives_are_those_of_torchs_gather(device: str) -> None:
    index = places(4, 64, 200).to(device)
    images = torch.randn(4, 3, 64, dtype=torch.float64, device=device, requires_grad=True)
    expanded = index.unsqueeze(1).expand(-1, 3, -1)
    results = []
    for take in (lambda x: gather_pixels(x, index), lambda x: x.gather(2, expanded)):
        (first,) = torch.autograd.grad(take(images).pow(3).sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), images)
        results.append((first, second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)


@on_each_device
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_sum_in_fixed_point_is_the_exact_one_in_any_order(size: float, device: str) -> None:
    index = places(3, 16, 5000).unsqueeze(1).expand(-1, 2, -1).to(device)
    values = (size * torch.randn(3, 2, 5000)).to(device)
    total = sum_in_fixed_point(values, index, 16)
    exact = torch.zeros(3, 2, 16, dtype=torch.float64, device=device)
    exact = exact.scatter_add_(2, index, values.double())
    torch.testing.assert_close(total.double(), exact, rtol=1e-7, atol=1e-10 * size)
    order = torch.randperm(5000)
    assert torch.equal(total, sum_in_fixed_point(values[:, :, order], index[:, :, order], 16))


def test_values_of_very_different_images_keep_their_digits() -> None:
    values = torch.tensor([[[1e-20, 2e-20]], [[1e20, 3e20]]])
    index = torch.zeros(2, 1, 2, dtype=torch.int64)
    total = sum_in_fixed_point(values, index, 1)
    torch.testing.assert_close(total, values.sum(2, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    values = torch.ones(2, 1, 3)
    values[0, 0, 1] = value
    total = sum_in_fixed_point(values, torch.zeros(2, 1, 3, dtype=torch.int64), 2)
    assert total[0].isnan().all()
    assert torch.equal(total[1], torch.tensor([[3.0, 0.0]]))


def test_zeros_sum_to_zero() -> None:
    total = sum_in_fixed_point(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3, dtype=torch.int64), 2)
    assert torch.equal(total, torch.zeros(1, 1, 2))
