"""What ranks compute together, as functions of tensors: sums, means, the k-th largest; and objects.

Every rank of the process group has to call them, in the same order. One process does as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_PIECE_BYTES = 2**28


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, on every rank; `values` stays as it is."""
    total = values.clone()
    dist.all_reduce(total)
    return total


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of gradients, and so on for higher orders."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks_with_gradient(gradients[0])


def sum_over_ranks_with_gradient(values: Tensor) -> Tensor:
    """`sum_over_ranks` that can be differentiated; all ranks do both together."""
    total: Tensor = _SumOverRanks.apply(values)
    return total


def global_mean(values: Tensor, loss_weight: float) -> Tensor:
    """Mean over the global batch of all ranks' values (n,), (), with its gradient.

    `loss_weight` is W / B, as in `LocalBatch`.
    """
    # W / B over W is 1 / B; summed over ranks with unequal counts it is the global mean.
    return sum_over_ranks_with_gradient(values.sum() * (loss_weight / dist.get_world_size()))


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
