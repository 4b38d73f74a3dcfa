"""Which kernels compute: on CUDA the ones that give the same bits each time.

A convolution's gradient there may be summed in whatever order its threads finish. Two runs of one
configuration then differ after a few steps, and a run that was resumed from the one left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What cuBLAS asks of those who want its sums in one order; read when it first works.
_CUBLAS_WORKSPACE = ":4096:8"


def use_deterministic_kernels(device: torch.device) -> None:
    """From here on; where an operation has no such kernel, torch says so."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    # Deterministic mode would fill every empty tensor with NaN, to show where one is read, at the
    # price of a kernel each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


@contextmanager
def restoring_settings() -> Iterator[None]:
    """After the block, torch's settings that `train` changes are as they were before.

    Training may be called by a program that goes on to do other things.
    """
    num_threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
