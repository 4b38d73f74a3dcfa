"""Adam with tensors for its rates, against PyTorch's with numbers that are set before each step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ganscale.training.scheduled_adam import ScheduledAdam
from tests.support.devices import on_each_device

BETA1 = 0.5


def weights(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(4, 3, 3, 3), (4,), (5, 2)]
    drawn = [torch.randn(shape, dtype=dtype).to(device) for shape in shapes]
    return [w.requires_grad_() for w in drawn]


def rates(step: int) -> tuple[float, float]:
    return 0.1 / (step + 1), 0.9 + 0.01 * step


def set_gradients(parameters: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in parameters:
        drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.grad = drawn.to(weight.device)


def scheduled(parameters: list[Tensor]) -> tuple[ScheduledAdam, Tensor, Tensor]:
    device = parameters[0].device
    lr, beta2 = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    return ScheduledAdam(parameters, lr, BETA1, beta2, 1e-8), lr, beta2


def take_step(optimizer: ScheduledAdam, lr: Tensor, beta2: Tensor, step: int) -> None:
    for tensor, value in zip((lr, beta2), rates(step), strict=True):
        tensor.fill_(value)
    optimizer.step()


def moments(optimizer: torch.optim.Optimizer, name: str) -> list[Any]:
    return [state[name] for state in optimizer.state.values()]


@on_each_device
def test_ten_steps_are_those_of_adam_with_moving_rates(device: str) -> None:
    ours, theirs = weights(device, torch.float64), weights(device, torch.float64)
    optimizer, lr, beta2 = scheduled(ours)
    expected = torch.optim.Adam(theirs, betas=(BETA1, 0.9), eps=1e-8)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        take_step(optimizer, lr, beta2, step)
        (group,) = expected.param_groups
        group["lr"], second = rates(step)
        group["betas"] = (BETA1, second)
        expected.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            moments(optimizer, name), moments(expected, name), rtol=1e-12, atol=1e-14
        )


@on_each_device
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_is(device: str) -> None:
    ours = weights(device)
    optimizer, lr, beta2 = scheduled(ours)
    scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=4.0)
    scaler.scale(torch.zeros((), device=device))  # a scaler makes its scale at its first loss
    taken = 0
    for step, spoilt in enumerate([True, False, True, False]):
        set_gradients(ours, step)
        if spoilt:
            assert ours[0].grad is not None
            ours[0].grad[0, 0, 0, 0] = torch.inf
            ours[0].grad[1] = torch.nan
        before = [w.detach().clone() for w in ours]
        averages = [m.clone() for m in moments(optimizer, "exp_avg")]
        for tensor, value in zip((lr, beta2), rates(step), strict=True):
            tensor.fill_(value)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(4.0)
        taken += not spoilt
        unmoved = [torch.equal(w, b) for w, b in zip(ours, before, strict=True)]
        assert all(unmoved) if spoilt else not any(unmoved)
        if spoilt:
            assert all(map(torch.equal, moments(optimizer, "exp_avg"), averages))
        assert {int(s) for s in moments(optimizer, "step")} == {taken}
        assert all(w.isfinite().all() for w in ours)


def test_state_of_pytorchs_adam_is_taken_up() -> None:
    ours, theirs = weights("cpu"), weights("cpu")
    expected = torch.optim.Adam(theirs, lr=0.1, betas=(BETA1, 0.9), eps=1e-8)
    set_gradients(theirs, 0)
    expected.step()
    optimizer, lr, beta2 = scheduled(ours)
    options = dict(optimizer.param_groups[0])
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    optimizer.param_groups[0].update(options)
    with torch.no_grad():
        for weight, other in zip(ours, theirs, strict=True):
            weight.copy_(other)
    set_gradients(ours, 1)
    set_gradients(theirs, 1)
    lr.fill_(0.1)
    beta2.fill_(0.9)
    optimizer.step()
    expected.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
