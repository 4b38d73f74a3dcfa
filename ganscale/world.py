"""The world a process lives in, as a value: its rank, how many ranks there are, its device.

Nothing else asks the environment for these. A test builds any world it likes; `World.detect` reads
what torchrun and Ray Train set. A process group is always initialised, even for a single process,
so that one process runs the very code that many run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ganscale.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]


@dataclass(frozen=True)
class World:
    """One process among `world_size`; `device` is a torch device string such as "cuda:0"."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world_size}")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and draws pictures for all."""
        return self.rank == 0

    @property
    def torch_device(self) -> torch.device:
        """The device as torch knows it."""
        import torch

        return torch.device(self.device)

    @classmethod
    def detect(cls, device: str = "auto") -> World:
        """Read RANK, LOCAL_RANK and WORLD_SIZE (torchrun, Ray Train); one process without them.

        `device` is "auto" (CUDA if there is one), "cpu" or "cuda". Raises `ConfigError` for
        another name, and when CUDA is requested but unusable.
        """
        import torch

        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {device!r}: expected auto, cpu or cuda")
        rank = launched_rank()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if device == "cuda":
            check_cuda("launch.use_gpu=true or --device cuda")
        if device == "cpu" or not torch.cuda.is_available():
            return cls(rank, local_rank, world_size, "cpu")
        # Modulo, as a launcher may show each worker only its own device, whatever its local rank.
        index = local_rank % torch.cuda.device_count()
        return cls(rank, local_rank, world_size, f"cuda:{index}")


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 for one that was started alone."""
    return int(os.environ.get("RANK", "0"))


def check_cuda(setting: str, *, index: int = 0) -> None:
    """Raise `ConfigError` with the reason if torch cannot use CUDA device `index` here.

    `setting` is what the user wrote to request the device; the message names it.
    """
    import torch

    if torch.cuda.is_available():
        if index < (count := torch.cuda.device_count()):
            return
        reason = f"this machine has {count} CUDA device(s), numbered from 0"
    else:
        # `is_available` swallows the reason; initialising raises it.
        try:
            torch.cuda.init()
            reason = "no CUDA device is visible (see CUDA_VISIBLE_DEVICES)"
        except (RuntimeError, AssertionError) as error:  # "Found no NVIDIA driver", no CUDA build
            reason = str(error).partition(". ")[0].strip()
    raise ConfigError(
        f"{setting}: torch {torch.__version__} cannot use this GPU: {reason}. Run where a GPU and "
        "its driver are installed (nvidia-smi shows them), or use the CPU: --device cpu, "
        "launch.use_gpu=false"
    )


@contextmanager
def process_group(world: World, *, timeout_seconds: float = 600.0) -> Iterator[None]:
    """Join the default process group for the time of the block, unless it exists already.

    Several ranks meet at MASTER_ADDR:MASTER_PORT; a single one needs no address.
    """
    import torch
    from torch import distributed as dist

    if dist.is_initialized():
        yield
        return
    if world.device.startswith("cuda"):
        torch.cuda.set_device(world.torch_device)
    timeout = timedelta(seconds=timeout_seconds)
    store = _meeting_point(world, timeout)
    dist.init_process_group(
        _backend(world, store),
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meeting_point(world: World, timeout: timedelta) -> Store:
    """Where the ranks find each other: at MASTER_ADDR, or in memory for a single one."""
    from torch import distributed as dist

    # A single process has no MASTER_ADDR, and a fixed port would clash with a second run on the
    # machine.
    if world.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    url = "env://"
    found = dist.rendezvous(url, world.rank, world.world_size, timeout=timeout)  # type: ignore[attr-defined]
    store: Store = next(found)[0]
    store.set_timeout(timeout)
    return dist.PrefixStore("ganscale", store)  # type: ignore[attr-defined]


def _backend(world: World, store: Store) -> str:
    """What exchanges tensors: gloo those of the host, NCCL those on GPUs.

    NCCL refuses ranks that share a GPU. Then gloo takes tensors on the GPU as well, by way of the
    host, on all ranks.
    """
    if not world.device.startswith("cuda"):
        return "gloo"
    if not is_device_shared(_device_name(world), world, store):
        return "cpu:gloo,cuda:nccl"
    if world.is_main:
        warnings.warn(
            "several ranks compute on one GPU: they exchange tensors by way of the host, which is "
            "slow, and their steps are not captured as CUDA graphs",
            stacklevel=4,
        )
    return "cpu:gloo,cuda:gloo"


def is_device_shared(name: str, world: World, store: Store) -> bool:
    """Whether any two ranks have named the same device; all ranks call this with their own."""
    # Each rank's index is no sign of it: a launcher may show every rank a device 0 of its own.
    store.set(f"device/{world.rank}", name)
    names = [store.get(f"device/{rank}") for rank in range(world.world_size)]
    return len({*names}) < world.world_size


def _device_name(world: World) -> str:
    """A name of this rank's GPU that no other GPU of any machine has."""
    import torch

    return str(torch.cuda.get_device_properties(world.torch_device).uuid)
