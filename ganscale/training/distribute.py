"""Distribution applied from outside to finished models: global batch statistics, then DDP.

Models know nothing of ranks. `distribute` returns the module that owns the weights and its DDP
wrapper, which averages gradients. One process uses both as well, so there is one code path.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ganscale.models.layers import MinibatchStd
from ganscale.world import World

__all__ = [
    "broadcast_bytes",
    "GlobalBatchNorm2d",
    "GlobalMinibatchStd",
    "convert_batch_statistics",
    "distribute",
    "gather_objects",
    "global_mean",
    "kth_largest",
    "sum_over_ranks",
]


_PIECE_BYTES = 2**28

# Buffers are the same on all ranks by construction; a broadcast in each forward would be wasted,
# and two forwards before a backward do not bear it. torch 2.14 renamed the option.
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the global batch, on any device.

    torch's SyncBatchNorm runs on GPUs only. Each rank puts its count, mean and centred sum of
    squares in its row of a table; one differentiable all-reduce fills the table, and the rows are
    merged as Chan, Golub and LeVeque (1979) do, which is exact for unequal counts and loses no
    digits. Statistics are fp32 whatever the input is. Running estimates are the same on all ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var, count = _global_statistics(x.float())
        # Running variances are unbiased, normalisation takes the biased one: as nn.BatchNorm2d
        # does.
        self._track(mean, var * (count / (count - 1)))
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        # One pass over the map instead of a subtraction, a division and an affine map.
        normalised = torch.addcmul(shift.view(1, -1, 1, 1), x.float(), scale.view(1, -1, 1, 1))
        return normalised.to(x.dtype)

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


class GlobalMinibatchStd(MinibatchStd):
    """The minibatch standard deviation with the global batch as its group."""

    def variance(self, x: Tensor) -> Tensor:
        _, var, _ = _global_statistics(x.flatten(1)[:, :, None, None])
        return var.view(x.shape[1:])


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks' x, (C,), and the count, ()."""
    channels = x.shape[1]
    # A view in channels_last. Two passes over rows are three times as fast on the CPU as var_mean,
    # and a rank without samples, at the end of an epoch, needs no case of its own.
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    local_mean = rows.sum(0) / max(len(rows), 1)
    local_squares = (rows - local_mean).square().sum(0)
    # The count is filled in on the device: a tensor from host memory would make CUDA wait for the
    # copy, once a layer and forward, and could not be captured in a graph.
    entry = torch.cat([local_mean, local_squares, x.new_full((1,), len(rows))])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own_row = F.pad(entry[None], (0, 0, rank, world_size - 1 - rank))  # zeros in the others' rows
    table = _sum_over_ranks_with_gradient(own_row)
    means, squares, counts = table.split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, var, count.detach()


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of gradients, and so on for higher orders."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum_over_ranks_with_gradient(gradients[0])


def _sum_over_ranks_with_gradient(values: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(values)
    return total


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


def distribute(model: nn.Module, world: World) -> tuple[nn.Module, DistributedDataParallel]:
    """Move to the device, make batch statistics global and wrap in DDP: (module, wrapper)."""
    module = convert_batch_statistics(model.to(world.torch_device))
    # With channels first, cuDNN's grouped convolutions take 2.4 times as long on an H100.
    module = module.to(memory_format=torch.channels_last)
    wrapper = DistributedDataParallel(
        module,
        gradient_as_bucket_view=True,
        # Otherwise DDP rearranges its buckets after the first step, and with them the order in
        # which more than two ranks' gradients are summed: a resumed run would round differently.
        find_unused_parameters=True,
        **_NO_BUFFER_SYNC,
    )
    return module, wrapper


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, on every rank; `values` stays as it is."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def global_mean(values: Tensor, loss_weight: float) -> Tensor:
    """Mean over the global batch of all ranks' values (n,), (), with its gradient.

    `loss_weight` is W / B, as in `LocalBatch`.
    """
    # W / B over W is 1 / B; summed over ranks with unequal counts it is the global mean.
    return _sum_over_ranks_with_gradient(values.sum() * (loss_weight / dist.get_world_size()))


def kth_largest(table: Tensor, k: Tensor) -> Tensor:
    """The k-th largest of the elementwise maximum over all ranks' tables (B,), (1,).

    `k` is an int64 tensor (), which follows a schedule; so the table is sorted instead of `topk`,
    whose k is a number of the host. `table` is changed.
    """
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.sort(descending=True).values.index_select(0, k.reshape(1) - 1)


def gather_objects(value: Any) -> list[Any]:
    """What every rank gave, in the order of ranks, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_bytes(data: bytes | None) -> bytes:
    """Rank 0's `data` on every rank; the others give None."""
    # Tensors on the host: a checkpoint need not fit on the GPU beside the run.
    size = torch.tensor(0 if data is None else len(data))
    dist.broadcast(size, src=0)
    received = bytearray(int(size)) if data is None else bytearray(data)
    whole = torch.frombuffer(received, dtype=torch.uint8) if received else torch.empty(0)
    for piece in whole.split(_PIECE_BYTES):
        dist.broadcast(piece, src=0)
    return bytes(received)
