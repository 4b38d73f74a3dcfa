"""What a run was trained with: the machine, the versions of what it uses, the commit of the code.

It is part of the event that begins each attempt, because attempts of one run may have different
machines and versions, and a result that cannot be traced to its code cannot be repeated.
"""

from __future__ import annotations

import functools
import os
import platform
import socket
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("ganscale", "torch", "torchvision", "ray", "numpy")
_GIT_SECONDS = 10.0


def provenance(device: str) -> dict[str, Any]:
    """Machine, versions and commit of this process, as plain values.

    `device` is the torch device that it trains on. The commit is null where the code is no git
    checkout; "+" behind it means that files which git knows have been changed since.
    """
    return {
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "device": _device_name(device),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@functools.cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    # Without this check git would find a repository that the environment happens to lie in.
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    # No git, or one that distrusts a checkout of another user.
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    )
    return done.stdout.strip()
