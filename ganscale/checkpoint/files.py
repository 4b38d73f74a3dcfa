"""The files of one checkpoint: written with their hashes, and read only as they were written.

A checkpoint is a folder `nimg-POSITION-aATTEMPT` with

    state.safetensors  all tensors               meta.json      config, versions, W&B run id
    state.json         everything else           metrics.jsonl  the rows logged so far
    manifest.json      sizes, sha256, attempt

It counts when its manifest does and every byte is as the manifest says. What is loaded is what was
verified: each file is read once, hashed in memory and decoded from there, so that a file which
changes between a check and a second read cannot slip in. The price is host memory for a whole
checkpoint, at the beginning of an attempt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ganscale.checkpoint.encoding import decode, flatten, tensor_file, tree_file
from ganscale.checkpoint.lineage import Attempt, CheckpointName
from ganscale.errors import CheckpointError
from ganscale.storage import MissingData, RetryPolicy, open_store

_TENSORS, _TREE, _META, _HISTORY = "state.safetensors", "state.json", "meta.json", "metrics.jsonl"
_FILES = (_TENSORS, _TREE, _META, _HISTORY)
MANIFEST = "manifest.json"
_FORMAT = 2

Bytes = bytes | memoryview


@dataclass(frozen=True)
class SavedState:
    """What is written: a state as a tree and tensors on the CPU, and what goes with it."""

    nimg: int
    tree: Any
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    history: bytes = b""
    metrics: Mapping[str, float] | None = None
    """What was last measured up to this position, by which the best checkpoints are chosen."""
    healthy_nimg: int | None = None
    """The newest checkpoint up to here is kept, as one to go back to."""


def saved_state(nimg: int, state: Any, meta: Mapping[str, Any], **more: Any) -> SavedState:
    """A state as it is written, from nested containers of tensors on the CPU."""
    tree, tensors = flatten(state)
    return SavedState(nimg, tree, tensors, meta, **more)


@dataclass(frozen=True)
class SavedFiles:
    """A checkpoint that has been read and verified."""

    name: CheckpointName
    tree: bytes
    tensors: bytes
    meta: dict[str, Any]
    history: bytes

    def state(self) -> Any:
        """The state, on the CPU. Raises `CheckpointError` if the files are not of one state."""
        return decode(self.tree, self.tensors)


class CheckpointFiles:
    """Reads, verifies and writes single checkpoints in a store.

    Whatever is wrong with a checkpoint's content is a `CheckpointError`; an error of the store,
    which says nothing about the content, is passed on as it is.

    Args:
        location: path or URL of the folder that holds the checkpoints.
        policy: how long reading one of their files is tried.
    """

    def __init__(self, location: str | Path, policy: RetryPolicy | None = None) -> None:
        self.backend = open_store(location, policy, for_writing=True)

    def verify(self, name: CheckpointName) -> str | None:
        """What is wrong with a checkpoint, in a few words; None if every byte is as written."""
        try:
            manifest = self.manifest(name)
            # In pieces, unlike `read`: nothing is decoded, so nothing needs to be held in memory.
            for file in _FILES:
                digest = hashlib.sha256()
                num_bytes = 0
                for chunk in self._chunks(name, file):
                    digest.update(chunk)
                    num_bytes += len(chunk)
                _compare(file, num_bytes, digest.hexdigest(), manifest["files"][file])
        except CheckpointError as error:
            return str(error)
        return None

    def read(self, name: CheckpointName) -> SavedFiles:
        """The files of a checkpoint. Raises `CheckpointError` if it does not verify."""
        data = self._read(name, _FILES)
        return SavedFiles(name, data[_TREE], data[_TENSORS], _meta(data), data[_HISTORY])

    def describe(self, name: CheckpointName) -> tuple[dict[str, Any], bytes]:
        """The `meta` and `history` of `read`, without the state that goes with them."""
        data = self._read(name, (_META, _HISTORY))
        return _meta(data), data[_HISTORY]

    def manifest(self, name: CheckpointName) -> dict[str, Any]:
        """A checkpoint's manifest. Raises `CheckpointError` if it is not as it was written."""
        data = b"".join(self._chunks(name, MANIFEST))
        try:
            manifest: dict[str, Any] = json.loads(data)
            seal = manifest.pop("sha256")
            # The seal is over the parsed values, which different bytes may have; comparing the
            # bytes as well makes every flipped bit of the file an error, blanks included.
            if seal != _seal(manifest) or data != _sealed(manifest):
                raise CheckpointError(f"{MANIFEST} has the wrong sha256")
            attempt = Attempt.from_json(manifest["attempt"])
            # A folder that was copied or renamed has a valid manifest, but of another checkpoint.
            if (manifest["nimg"], attempt.number) != (name.nimg, name.attempt):
                raise CheckpointError(f"{MANIFEST} belongs to another checkpoint")
            if set(manifest["files"]) != set(_FILES) or manifest["format"] != _FORMAT:
                raise CheckpointError(f"{MANIFEST} does not list {', '.join(_FILES)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST} is unreadable ({type(error).__name__})") from None
        return manifest

    def write_files(
        self, attempt: Attempt, state: SavedState, before_manifest: Callable[[], None]
    ) -> CheckpointName:
        """Write a checkpoint durably. `before_manifest` may still refuse it by raising.

        Raises `OSError` or `StoreError`, and then no checkpoint of that name counts.
        """
        name = CheckpointName(state.nimg, attempt.number)
        described: dict[str, dict[str, Any]] = {}

        def add_measured(file: str, pieces: Iterable[Bytes]) -> None:
            digest, num_bytes = hashlib.sha256(), 0

            # Hashed on the way to the store and not read back: what the manifest describes is what
            # was meant to be written, so that an error of the disk or the store shows.
            def measured() -> Iterable[Bytes]:
                nonlocal num_bytes
                for piece in pieces:
                    digest.update(piece)
                    num_bytes += len(piece)
                    yield piece

            add(file, measured())
            described[file] = {"num_bytes": num_bytes, "sha256": digest.hexdigest()}

        with self.backend.new_folder(str(name)) as add:
            add_measured(_TENSORS, tensor_file(state.tensors))
            add_measured(_TREE, [tree_file(state.tree)])
            # The digest of the tensors is there for people who compare two runs by eye.
            meta = {**state.meta, "tensors_sha256": described[_TENSORS]["sha256"]}
            add_measured(_META, [json.dumps(meta, indent=2).encode()])
            add_measured(_HISTORY, [state.history])
            manifest = {
                "format": _FORMAT,
                "nimg": state.nimg,
                "attempt": attempt.to_json(),
                "metrics": dict(state.metrics or {}),
                "files": described,
            }
            before_manifest()
            # Last: in an object store, where folders do not exist, it makes the checkpoint count.
            add(MANIFEST, [_sealed(manifest)])
        return name

    def _read(self, name: CheckpointName, files: Sequence[str]) -> dict[str, bytes]:
        """Some of a checkpoint's files, verified."""
        manifest = self.manifest(name)
        data = {}
        for file in files:
            data[file] = b"".join(self._chunks(name, file))
            digest = hashlib.sha256(data[file]).hexdigest()
            _compare(file, len(data[file]), digest, manifest["files"][file])
        return data

    def _chunks(self, name: CheckpointName, file: str) -> Iterable[bytes]:
        # These two are damage of the checkpoint. Any other error is one of the store (a refusal,
        # a lost network): taken for damage, it would make a run go on from an older checkpoint.
        try:
            yield from self.backend.chunks(f"{name}/{file}")
        except MissingData:
            raise CheckpointError(f"{file} is missing") from None
        except IsADirectoryError:
            raise CheckpointError(f"{file} is a directory") from None


def _meta(data: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(data[_META])
    except ValueError as error:
        raise CheckpointError(f"{_META} is unreadable ({type(error).__name__})") from None
    return meta


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=2).encode()


def _compare(file: str, num_bytes: int, sha256: str, expected: Mapping[str, Any]) -> None:
    if num_bytes != expected["num_bytes"]:
        raise CheckpointError(f"{file} has {num_bytes} bytes, expected {expected['num_bytes']}")
    if sha256 != expected["sha256"]:
        raise CheckpointError(f"{file} has the wrong sha256")
