"""A state as two plain files: a tree in JSON and its tensors in the safetensors format.

Unlike a pickle, nothing in them can be executed when they are read. The same state gives the same
bytes, so equal sha256 of the tensor files mean that two runs hold the same weights. Tensors are
written piece by piece from the memory they lie in: no second copy is made, and hashing or writing a
piece releases the interpreter's lock, so that training goes on meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ganscale.errors import CheckpointError

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
            # Pairs and not a JSON object, whose keys would all come back as strings: the states of
            # torch's optimizers are keyed by integers. Pairs keep the order of the keys as well.
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
    """The safetensors file of tensors on the CPU, in pieces.

    safetensors' own functions write to a local path or make one object of the whole file. Pieces go
    to any store, and are hashed on the way.
    """
    # Wide types first, so that every tensor begins at a multiple of its element's size, and then by
    # name, so that the bytes do not depend on the order of the dictionary.
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
    text += b" " * (-len(text) % 8)  # so that the data are aligned, as in safetensors' files
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        # As bytes, because numpy has no bfloat16. A view, unless the tensor is not contiguous.
        raw = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for first in range(0, raw.size, _PIECE_BYTES):
            yield raw[first : first + _PIECE_BYTES].data


def decode(tree: bytes, tensors: bytes) -> Any:
    """The state, on the CPU. Raises `CheckpointError` if the two files are not of one state."""
    try:
        by_path = load(tensors)
        return _build(json.loads(tree), by_path)
    # safetensors documents no exceptions, and what a damaged tree may raise is hard to list. The
    # bytes were verified, so whatever it is comes from the content and is not worth a retry.
    except Exception as error:
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
