"""A guard under which nothing may cross from the device to the host, or back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
_CONSTRUCTORS = ("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "scalar_tensor")
_REFUSED = {
    torch.ops.aten._local_scalar_dense.default: "reads a value from the device",
    torch.ops.aten.is_nonzero.default: "reads a value from the device",
    torch.ops.aten.equal.default: "reads a value from the device",
    torch.ops.aten.nonzero.default: "has a shape that depends on values",
    torch.ops.aten.masked_select.default: "has a shape that depends on values",
    torch.ops.aten.lift_fresh.default: "makes a tensor of host memory",
}
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class HostAccess(AssertionError):
    """Something in the block crossed between host and device, or drew random numbers."""


class _DeviceOnly(TorchDispatchMode):
    """Refuses operations that read from the device, copy from the host, or draw."""

    enabled = True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.enabled:
            if func in _REFUSED:
                raise HostAccess(f"{func} {_REFUSED[func]}")
            if func.overloadpacket in _INDEXING and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            ):
                raise HostAccess(f"{func} with a mask has a shape that depends on values")
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise HostAccess(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise HostAccess(f"{name} crosses between host and device")

    return refuse


@contextmanager
def device_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise `HostAccess` on any host read, tensor of host data, or random draw in the block.

    On the CPU, where a copy between host and device looks like any other, the Python functions that
    make one are refused. DDP's reducer keeps books in tensors of the host; so while a backward runs
    only those Python functions are watched, which covers ganscale's own backwards.
    """
    mode = _DeviceOnly()  # type: ignore[no-untyped-call]
    backward = torch.Tensor.backward

    def unwatched_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        mode.enabled = False
        try:
            backward(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            mode.enabled = True

    with mode, monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", unwatched_backward)
        for name in (*_READS, "new_tensor"):
            patch.setattr(torch.Tensor, name, _refusing(f"Tensor.{name}"))
        for name in _CONSTRUCTORS:
            patch.setattr(torch, name, _refusing(f"torch.{name}"))
        yield
