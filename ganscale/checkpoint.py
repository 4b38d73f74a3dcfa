"""Checkpoints: everything a run needs to go on, complete and verified or not there at all.

A checkpoint is a folder with `state.pt` (tensors, loaded with `weights_only`), `meta.json` (for
people) and `manifest.json` (size and sha256 of the other two). It is written under a temporary
name, fsynced and renamed; older ones are pruned only after that. The newest one that verifies wins,
a damaged one is passed over with a warning that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ganscale.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "DamagedCheckpointWarning",
    "list_checkpoints",
    "load_state",
    "newest_valid",
    "save_checkpoint",
    "tensor_digest",
    "verify_checkpoint",
]

_PREFIX = "nimg-"
_STATE, _META, _MANIFEST = "state.pt", "meta.json", "manifest.json"


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint failed verification and an older one is used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and the position it was taken at."""

    path: Path
    nimg: int


def save_checkpoint(
    folder: Path, state: dict[str, Any], *, meta: dict[str, Any], nimg: int, keep_last: int
) -> Checkpoint:
    """Write `state` durably as the checkpoint at `nimg`, then prune older ones.

    `keep_last` counts the new one. One that lies beyond it is damaged or abandoned and is left; it
    is written anew when the run gets there. `meta` is JSON for people; the digest of all tensors is
    added to it, so that two runs can be compared by eye. An existing checkpoint at `nimg` that
    verifies is kept as it is.
    """
    checkpoint = Checkpoint(folder / f"{_PREFIX}{nimg:012d}", nimg)
    if not checkpoint.path.exists() or verify_checkpoint(checkpoint):
        _write(checkpoint, state, {**meta, "nimg": nimg, "tensors_sha256": tensor_digest(state)})
    older = [c for c in list_checkpoints(folder) if c.nimg < nimg]
    for old in older[: len(older) + 1 - keep_last]:
        shutil.rmtree(old.path, ignore_errors=True)
    return checkpoint


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in `folder`, oldest first, verified or not."""
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and path.is_dir():
            found.append(Checkpoint(path, int(number)))
    return sorted(found, key=lambda c: c.nimg)


def verify_checkpoint(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every byte is as written."""
    try:
        manifest = json.loads((checkpoint.path / _MANIFEST).read_text())
        expected = {name: (f["num_bytes"], f["sha256"]) for name, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} is unreadable ({type(error).__name__})"
    if set(expected) != {_STATE, _META}:
        return f"{_MANIFEST} does not list {_STATE} and {_META}"
    for name, (num_bytes, sha256) in expected.items():
        path = checkpoint.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes, expected {num_bytes}"
        if _sha256(path) != sha256:
            return f"{name} has the wrong sha256"
    return None


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; warns of each damaged one that is passed over."""
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = verify_checkpoint(checkpoint)
        if problem is None:
            return checkpoint
        warnings.warn(
            f"checkpoint {checkpoint.path} is damaged: {problem}; trying an older one",
            DamagedCheckpointWarning,
            stacklevel=2,
        )
    return None


def load_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The saved state, on the CPU. Raises `CheckpointError` when it cannot be read."""
    path = checkpoint.path / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no exceptions
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    return state


def tensor_digest(state: dict[str, Any]) -> str:
    """sha256 over names, types, shapes and bytes of all tensors in nested containers."""
    digest = hashlib.sha256()
    for name, tensor in _tensors("", state):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(prefix: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _tensors(f"{prefix}/{key}", value[key])
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{prefix}/{index}", item)


def _write(checkpoint: Checkpoint, state: dict[str, Any], meta: dict[str, Any]) -> None:
    folder = checkpoint.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".tmp-{checkpoint.path.name}"
    temporary.mkdir()
    torch.save(state, temporary / _STATE)
    (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n")
    files = {
        name: {"num_bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
        for name in (_STATE, _META)
    }
    (temporary / _MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    if checkpoint.path.exists():  # it did not verify
        shutil.rmtree(checkpoint.path)
    temporary.replace(checkpoint.path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
