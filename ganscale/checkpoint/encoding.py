"""A state as two plain files: a tree in JSON and its tensors in the safetensors format.

Nothing in them can be executed. The same state gives the same bytes, so the sha256 of the tensor
file tells whether two runs hold the same weights. Tensors are written piece by piece from where
they lie: no second copy, and the interpreter is free while a piece is hashed or written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ganscale.errors import CheckpointError

__all__ = ["decode", "flatten", "tensor_file", "tree_file"]

_PIECE_BYTES = 2**24
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """(tree, tensors by path) of nested dicts, lists and tuples of tensors, numbers and strings.

    Raises `TypeError` on anything else, so that nothing is saved that would not come back.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            assert path not in tensors, f"two tensors at {path}"
            if value.dtype not in _NAMES:
                raise TypeError(f"{path} is {value.dtype}, which a checkpoint cannot hold")
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, dict):
            assert all(isinstance(key, str | int) for key in value), f"keys at {path}"
            return {"dict": [[key, walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{path}/{index}") for index, item in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")

    return walk(state, ""), tensors


def tree_file(tree: Any) -> bytes:
    """The structure of a state as JSON, in which paths stand for tensors."""
    return json.dumps(tree).encode()


def tensor_file(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors file of tensors on the CPU, in pieces."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        raw = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for first in range(0, raw.size, _PIECE_BYTES):
            yield raw[first : first + _PIECE_BYTES].data


def decode(tree: bytes, tensors: bytes) -> Any:
    """The state, on the CPU. Raises `CheckpointError` if the two files are not of one state."""
    try:
        by_path = load(tensors)
        return _build(json.loads(tree), by_path)
    except Exception as error:  # safetensors documents no exceptions
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot be decoded ({type(error).__name__}: {reason})") from error


def _build(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _build(item, tensors) for key, item in value}
    items = [_build(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
