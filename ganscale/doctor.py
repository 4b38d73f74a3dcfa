"""What machine this is, and what ganscale would use of it: devices, data, weights, tracking.

It looks up the same functions that training asks, so that it reports what would really happen.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from ganscale.data.resolve_source import CIFAR10_ENV
from ganscale.metrics.extractors import inception_weights
from ganscale.tracking.wandb_sink import resolve_mode

_PACKAGES = ("ganscale", "torch", "torchvision", "ray", "webdataset", "wandb", "numpy")


def findings(storage: Path) -> list[tuple[str, str]]:
    """(what, value) pairs for people; `storage` is where runs would be written."""
    import torch

    rows = [("python", platform.python_version()), ("system", platform.platform())]
    rows += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    rows += [("cpus", str(os.cpu_count())), ("memory", _memory())]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"gpu {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    precision = "fp16 with gradient scaling" if torch.cuda.is_available() else "fp32"
    rows.append(("gpus", str(torch.cuda.device_count())))
    rows.append(("precision auto", precision))
    # The folder may not exist yet; the free space is that of the file system it would be made on.
    existing = next(p for p in (storage.absolute(), *storage.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    rows.append(("storage", f"{storage.absolute()}, {free:.1f} GiB free"))
    rows.append((CIFAR10_ENV, os.environ.get(CIFAR10_ENV) or "not set: would be downloaded"))
    rows.append(("RAY_ADDRESS", os.environ.get("RAY_ADDRESS") or "not set: Ray starts here"))
    rows.append(("wandb auto", resolve_mode("auto")))
    weights = inception_weights()
    extractor = "efficientnet-lite0" if weights is None else f"inception-v3, {weights}"
    rows.append(("extractor auto", extractor))
    return rows


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
