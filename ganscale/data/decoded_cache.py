"""Small sets decoded once: pixels kept in memory and gathered, in the same order as streamed.

An image is decoded when it is first needed, so a run starts at once, and a damaged sample is met
at the position where streaming meets it. In RAM the pixels are shared by the processes of a node:
the file behind them is unlinked as soon as all have mapped it, so it goes with the last of them,
however that ends. Each process remembers only what it wrote itself, which needs no locks; two that
decode the same image write the same bytes.
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ganscale.data.reader import DeviceRows, ImageReader, Images
from ganscale.errors import ConfigError

CacheKind = Literal["none", "ram", "device"]
Exchange = Callable[[Any], list[Any]]
"""Gives every rank what each rank gave, in the order of ranks."""

# What "auto" takes at most of the memory that is free. Of a GPU's it is little, as the networks and
# their activations are not there yet when it is chosen.
_RAM_SHARE = 0.25
_DEVICE_SHARE = 0.1
_ZEROS = bytes(2**24)
_UINT8 = np.dtype(np.uint8)


class Pixels(Protocol):
    """Decoded images by number, (N, C, H, W)."""

    def put(self, ids: NDArray[np.int64], pixels: torch.Tensor) -> None:
        """Keep some images."""
        ...

    def take(self, ids: NDArray[np.int64]) -> torch.Tensor | DeviceRows:
        """Some images that were put, (n, C, H, W)."""
        ...

    def __len__(self) -> int: ...


class DecodedImages:
    """Keeps what another reader decodes."""

    def __init__(self, reader: ImageReader, pixels: Pixels) -> None:
        self.reader = reader
        self.pixels = pixels
        self._known = np.zeros(len(pixels), dtype=np.bool_)

    def read(self, samples: NDArray[np.int64]) -> Images:
        valid = self._known[samples]
        if valid.all():
            return Images(self.pixels.take(samples), valid)
        # Damaged samples stay unknown: each time they are due they are read, and reported, again.
        fresh = self.reader.read(samples[~valid])
        decoded = samples[~valid][fresh.valid]
        self.pixels.put(decoded, fresh.pixels)
        self._known[decoded] = True
        valid = self._known[samples]
        return Images(self.pixels.take(samples[valid]), valid, fresh.damaged)

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        self.reader.prefetch(samples[~self._known[samples]])

    def is_cached(self, samples: NDArray[np.int64]) -> bool:
        return bool(self._known[samples].all())

    def close(self) -> None:
        self.reader.close()


class HostPixels:
    """Images in memory that the processes of a node share.

    Args:
        shape: (N, C, H, W).
        rank: of this process.
        exchange: between all ranks; every rank makes its `HostPixels` at the same time.
        dtype: of the values.

    Raises `ConfigError` on every rank if a node has no room.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        rank: int,
        exchange: Exchange,
        dtype: np.dtype[Any] = _UINT8,
    ) -> None:
        self.shape = shape
        memory = _shared_memory(math.prod(shape) * dtype.itemsize, rank, exchange)
        self._rows = memory.view(dtype).reshape(shape[0], -1)

    def put(self, ids: NDArray[np.int64], pixels: torch.Tensor) -> None:
        self._rows[ids] = pixels.numpy().reshape(len(ids), math.prod(self.shape[1:]))

    def take(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(self._rows[ids]).view(len(ids), *self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]


class DevicePixels:
    """Images in the memory of an accelerator there."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        self._pixels = torch.empty(shape, dtype=dtype, device=device)

    def put(self, ids: NDArray[np.int64], pixels: torch.Tensor) -> None:
        device = self._pixels.device
        self._pixels[torch.from_numpy(ids).to(device)] = pixels.to(device)

    def take(self, ids: NDArray[np.int64]) -> DeviceRows:
        return DeviceRows(self._pixels, torch.from_numpy(ids))

    def __len__(self) -> int:
        return len(self._pixels)


def choose_cache(
    wanted: Literal["auto", "none", "ram", "device"],
    num_bytes: int,
    device: torch.device,
    exchange: Exchange,
) -> CacheKind:
    """What `data.cache` means here, the same on all ranks.

    auto is "device" where the decoded set takes at most a tenth of every rank's free memory on CUDA
    devices, else "ram" where it takes at most a quarter of every node's free memory, else "none".
    """
    if wanted != "auto":
        return wanted
    on_device = 0
    if device.type == "cuda":
        on_device, _ = torch.cuda.mem_get_info(device)
    # All ranks decide by the values of all, so that they decide alike: a shared cache needs every
    # rank of a node, and ranks with different caches would be differently fast.
    rooms = exchange((on_device, _available_memory()))
    if all(num_bytes <= _DEVICE_SHARE * room for room, _ in rooms):
        return "device"
    return "ram" if all(num_bytes <= _RAM_SHARE * room for _, room in rooms) else "none"


def _available_memory() -> int:
    """Bytes that this process may still use: the machine's, or its container's if that is less."""
    available: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available


def _shared_memory(num_bytes: int, rank: int, exchange: Exchange) -> NDArray[np.uint8]:
    # One rank of each node makes the file. Its failure is passed to all ranks as None, so that they
    # all raise: one that raised alone would leave the others waiting in the next exchange.
    nodes = exchange(_node())
    leader = nodes.index(nodes[rank])
    path = _reserve(num_bytes) if leader == rank else None
    paths = exchange(path)
    if any(paths[nodes.index(node)] is None for node in nodes):
        raise ConfigError(
            f"data.cache=ram needs {num_bytes / 2**30:.2f} GiB on every node, and at least one "
            f"has less in {', '.join(_places())}: set data.cache=none"
        )
    memory = np.asarray(np.memmap(paths[leader], np.uint8, "r+"))
    exchange(None)  # a barrier: all ranks have mapped it
    if leader == rank:
        os.unlink(paths[leader])
    return memory


def _node() -> tuple[str, str]:
    """Equal for processes that see the same files."""
    # Containers on one host may have the host's name, but each has its own mounts.
    mounts = Path("/proc/self/ns/mnt")
    return socket.gethostname(), os.readlink(mounts) if mounts.exists() else ""


def _places() -> list[str]:
    return [place for place in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(place)]


def _reserve(num_bytes: int) -> str | None:
    """A file of that many bytes, in memory if it fits there; None if it fits nowhere."""
    for place in _places():
        descriptor, path = tempfile.mkstemp(prefix="ganscale-", dir=place)
        try:
            # Written, not only made that long: a sparse file gets its memory when a page is first
            # touched, and where there is none left then, the system kills the process (SIGBUS).
            for start in range(0, num_bytes, len(_ZEROS)):
                os.write(descriptor, _ZEROS[: num_bytes - start])
            return path
        except OSError:
            os.unlink(path)
        finally:
            os.close(descriptor)
    return None
