"""The averaged weights against the formula."""

from __future__ import annotations

import torch
from torch import nn

from ganscale.ema import Ema, ema_weight


def test_halflife_is_in_images_whatever_the_batch() -> None:
    for batch_size in (10, 50, 100):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        ema = Ema(model)
        nn.init.ones_(model.weight)
        for _ in range(100 // batch_size):
            ema.update(model, torch.tensor(ema_weight(batch_size, 100)))
        torch.testing.assert_close(ema.model.weight, torch.tensor([[0.5]]))


def test_halflife_zero_follows_at_once_and_buffers_are_copied() -> None:
    model = nn.BatchNorm2d(2)
    ema = Ema(model)
    nn.init.constant_(model.weight, 3.0)
    assert model.running_mean is not None
    model.running_mean.fill_(7.0)
    ema.update(model, torch.tensor(ema_weight(64, 0)))
    torch.testing.assert_close(ema.model.weight, model.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(ema.model.running_mean, model.running_mean)


def test_average_neither_trains_nor_shares_storage() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    before = ema.model.state_dict()["weight"].clone()
    nn.init.ones_(model.weight)
    torch.testing.assert_close(ema.model.weight, before, rtol=0, atol=0)
