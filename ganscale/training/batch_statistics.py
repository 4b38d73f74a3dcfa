"""Layers that look across the batch, with the global batch in place of a rank's own.

Models use `nn.BatchNorm2d` and `MinibatchStd` and know nothing of ranks; `convert_batch_statistics`
replaces both from outside. PyTorch's SyncBatchNorm runs on GPUs only
and cannot be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ganscale.models.elementwise import elementwise
from ganscale.models.input_gradients import are_parameters_wanted
from ganscale.models.layers import MinibatchStd, at_least_fp32
from ganscale.training.collectives import sum_over_ranks, sum_over_ranks_with_gradient


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the global batch, on any device.

    Statistics are fp32 whatever the input is. Running estimates are the same on all ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y: Tensor
        y, mean, var, count = _BatchNorm.apply(x, self.weight, self.bias, self.eps)
        # Running variances are unbiased, normalisation takes the biased one: as nn.BatchNorm2d
        # does.
        self._track(mean, var * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running estimates, unless fp16 has overflowed: the optimizer skips such a step,
        but what is not finite would stay in an average for good."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        is_finite = (mean + var).isfinite().all()
        momentum = 0.0 if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(is_finite, running.lerp(new, momentum), running))
        self.num_batches_tracked.add_(is_finite)


class _BatchNorm(torch.autograd.Function):
    """x (N, C, H, W) to its normalised form, and the statistics that this was done with.

    By PyTorch's own kernels for the passes over the maps, with one all-reduce of a few numbers a
    channel between them, forward and backward. Composed of elementary operations, as
    `_composed` is, a step of a small GAN spends a fifth of its time here.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = at_least_fp32(x)
        mean, var, count = _merged(_local_statistics(values))
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, bias, mean, scale, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return _normalised(values, mean, scale, weight, bias, x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        x, weight, bias, mean, scale, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient that is differentiated in its turn, as R1's is: by operations that PyTorch
            # knows the derivatives of.
            inputs = (x, weight, bias) if are_parameters_wanted() else (x, None, None)
            needed = [t for t in inputs if t is not None and t.requires_grad]
            y = _composed(x, weight, bias, ctx.eps)
            results = iter(torch.autograd.grad(y, needed, gradient, create_graph=True))
            return (
                *(next(results) if t is not None and t.requires_grad else None for t in inputs),
                None,
            )
        values, gradient = at_least_fp32(x), at_least_fp32(gradient)
        by_weight, by_bias = _backward_sums(gradient, values, mean, scale)
        # The derivative through the statistics, which all ranks' samples are part of:
        # dx = scale w (g - mean(g) - x^ mean(g x^)), with means over the global batch.
        sums = sum_over_ranks(torch.stack([by_weight, by_bias])) / count
        factor = scale if weight is None else scale * weight
        slope = -factor * scale * sums[0]
        shift = -factor * sums[1] - slope * mean
        coefficients = _channels(slope), _channels(factor), _channels(shift)
        return (
            _linear(values, gradient, *coefficients, x.dtype),
            by_weight if weight is not None else None,
            by_bias if bias is not None else None,
            None,
        )


def _composed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same as `_BatchNorm`, of operations that can be differentiated to any order."""
    values = at_least_fp32(x)
    mean, var, _ = _global_statistics(values)
    return _normalised(values, mean, torch.rsqrt(var + eps), weight, bias, x.dtype)


def _normalised(
    values: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(values - mean) scale weight + bias, in one pass over the map."""
    factor = scale if weight is None else scale * weight
    shift = -mean * factor if bias is None else bias - mean * factor
    return _affine(values, _channels(factor), _channels(shift), dtype)


@elementwise
def _affine(x: Tensor, factor: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """factor x + shift."""
    return torch.addcmul(shift, x, factor).to(dtype)


@elementwise
def _linear(
    x: Tensor, gradient: Tensor, slope: Tensor, factor: Tensor, shift: Tensor, dtype: torch.dtype
) -> Tensor:
    """slope x + factor gradient + shift."""
    return torch.addcmul(shift, x, slope).addcmul_(gradient, factor).to(dtype)


def _channels(values: Tensor) -> Tensor:
    """(C,) to the shape that maps are multiplied by."""
    return values.view(1, -1, 1, 1)


def _local_statistics(x: Tensor) -> Tensor:
    """Mean, centred sum of squares and count of each channel of x, (2 C + 1,)."""
    num = x.numel() // x.shape[1]
    if num == 0:  # a rank without samples, at the end of an epoch
        return x.new_zeros(2 * x.shape[1] + 1)
    mean, var = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
    # The count is filled in on the device: a tensor from host memory would make CUDA wait for the
    # copy, once a layer and forward, and could not be captured in a graph.
    return torch.cat([mean, var * num, x.new_full((1,), num)])


def _backward_sums(
    gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """This rank's sums of g x^ and of g, each (C,): the gradients of weight and bias."""
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    ones = torch.ones_like(mean)
    _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
        gradient, x, ones, None, None, mean, scale, True, 0.0, [False, True, True]
    )
    return by_weight, by_bias


class GlobalMinibatchStd(MinibatchStd):
    """The minibatch standard deviation with the global batch as its group."""

    def variance(self, x: Tensor) -> Tensor:
        _, var, _ = _global_statistics(x.flatten(1)[:, :, None, None])
        return var.view(x.shape[1:])


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks' x, (C,), and the count, ().

    Differentiable to any order.
    """
    channels = x.shape[1]
    # A view in channels_last. Two passes over rows are three times as fast on the CPU as var_mean,
    # and a rank without samples, at the end of an epoch, needs no case of its own.
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    mean = rows.sum(0) / max(len(rows), 1)
    squares = (rows - mean).square().sum(0)
    mean, var, count = _merged(torch.cat([mean, squares, x.new_full((1,), len(rows))]))
    return mean, var, count.detach()


def _merged(entry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' statistics (2 C + 1,) as one: mean and biased variance, (C,), and the count, ().

    Each rank puts its own into its row of a table; one all-reduce fills the table, and the rows are
    merged as Chan, Golub and LeVeque (1979) do, which is exact for unequal counts and loses no
    digits.
    """
    channels = len(entry) // 2
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own_row = F.pad(entry[None], (0, 0, rank, world_size - 1 - rank))  # zeros in the others' rows
    table = sum_over_ranks_with_gradient(own_row)
    means, squares, counts = table.split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, var, count


def convert_batch_statistics(module: nn.Module) -> nn.Module:
    """Replace batch norms and minibatch deviations in `module` by those of the global batch.

    Children are replaced in place, as `nn.SyncBatchNorm.convert_sync_batchnorm` does; parameters,
    buffers and names in state dictionaries stay the same. Returns the replacement of `module`.
    """
    replacement = module
    if type(module) is nn.BatchNorm2d:
        replacement = GlobalBatchNorm2d(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        # The same dictionaries, so parameters and buffers stay the same objects.
        replacement._parameters = module._parameters
        replacement._buffers = module._buffers
        replacement.train(module.training)
    elif type(module) is MinibatchStd:
        replacement = GlobalMinibatchStd().train(module.training)
    for name, child in module.named_children():
        replacement.add_module(name, convert_batch_statistics(child))
    return replacement
