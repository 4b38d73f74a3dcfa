"""Functions that work element by element, and their compilation into one kernel each.

A pass over a feature map costs what it reads and writes. Bias, leaky ReLU, gain and limit, one
after the other, read and write the map four times where once would do. A function that is marked
`elementwise` says what one pass should compute. It is called as it is, or, within a
`KernelCompiler`, as the one kernel that torch.compile makes of it.

What autograd records is never compiled: such functions are called in the forwards and backwards of
`torch.autograd.Function`s. A compiled region refuses to be differentiated twice from outside
(pytorch#91469), and torch 2.14.1 compiles a whole phase with R1 inside but gets the second
derivatives of custom Functions wrong without a word. A kernel within a Function has neither
problem: penalties, DistributedDataParallel and CUDA graphs see a Function like any other.

Nor are sums: an element of the result depends on one element of each map, so it has the same bits
however the work is cut into blocks. How a sum is cut Inductor may decide by timing, anew in each
process (pytorch#189121), and its bits would differ after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])

_Kernel = Callable[..., Tensor]

_compiler: KernelCompiler | None = None
# For the whole process: what one run has compiled the next one need not.
_kernels: dict[Hashable, _Kernel] = {}


def elementwise(function: F) -> F:
    """Mark a function of tensors and numbers that computes each element from those at its place.

    Tensors broadcast. It may work in place on what it has made itself, not on its arguments.
    """

    @wraps(function)
    def call(*arguments: Any) -> Tensor:
        # A compiled kernel has no derivatives, so where autograd records, it sees the operations.
        if _compiler is None or torch.is_grad_enabled():
            return function(*arguments)
        return _compiler.run(function, arguments)

    return cast(F, call)


class KernelCompiler:
    """While it is entered, elementwise functions are compiled, once for each form of arguments.

    Args:
        on_failure: is called with the reason where there is no compiler, or it fails. It may raise;
            otherwise functions are called as they are from then on.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._works = True
        self._outer: KernelCompiler | None = None

    def __enter__(self) -> None:
        # Not a thread's own, as the engine's threads run backwards.
        global _compiler
        self._outer, _compiler = _compiler, self

    def __exit__(self, *_: object) -> None:
        global _compiler
        _compiler = self._outer

    def run(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        """The function's value at these arguments, by its kernel."""
        if not self._works:
            return function(*arguments)
        form = (function, *(_form(argument) for argument in arguments))
        # Autograd has no part in it; whether an argument asks for a gradient makes no difference.
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        # Nor has autocast, which would have Dynamo make a kernel for inside and one for outside.
        with torch.autocast(device, enabled=False):
            if form in _kernels:
                return _kernels[form](*arguments)
            return self._first_run(function, form, arguments)

    def _first_run(
        self, function: Callable[..., Tensor], form: Hashable, arguments: tuple[Any, ...]
    ) -> Tensor:
        # Here and not above: importing the compiler takes seconds.
        from torch._dynamo.exc import TorchDynamoException

        # A kernel is compiled when it is first needed. There is never a second one to compile at
        # the same time, for which Inductor would start a process for each core, in each worker.
        options: dict[str, Any] = {"compile_threads": 1}
        kernel = torch.compile(_copy(function), fullgraph=True, dynamic=False, options=options)
        try:
            result: Tensor = kernel(*arguments)
        except TorchDynamoException as error:
            self._on_failure(error)
            self._works = False
            return function(*arguments)
        _kernels[form] = kernel
        return result


def _form(argument: Any) -> Hashable:
    """What a kernel is compiled for: of a tensor all but its values, else the value."""
    if not isinstance(argument, Tensor):
        constant: Hashable = argument
        return constant
    return argument.shape, argument.stride(), argument.dtype, argument.device


def _copy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with a code object of its own.

    Dynamo keeps what it compiles by code object. It would look through a network's forms one by one
    at each call, and give up after the eighth.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
