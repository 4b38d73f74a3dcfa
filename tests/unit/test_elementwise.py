"""Compiled elementwise functions compute what the plain ones do, and nothing is compiled twice.

Compilers take seconds, so each thing is compiled here once, at a small size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from ganscale.models import elementwise as module
from ganscale.models.elementwise import KernelCompiler, elementwise
from ganscale.models.fused import bias_leaky_relu
from tests.unit.test_fused import derivatives


def refuse(error: Exception) -> NoReturn:
    raise error


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """As in a new process: what was compiled before is forgotten, but for the files."""
    kernels: dict[Any, Any] = {}
    monkeypatch.setattr(module, "_kernels", kernels)
    yield kernels
    assert module._compiler is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """What is compiled: torch.compile traces and guards as ever, but no kernels are built."""
    seen: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        forward: Callable[..., Any] = graph.forward
        return forward

    compile_ = torch.compile

    def traced(function: Callable[..., Tensor], **arguments: Any) -> Callable[..., Tensor]:
        del arguments["options"]  # of Inductor, for which the backend stands in
        return compile_(function, backend=backend, **arguments)

    monkeypatch.setattr(torch, "compile", traced)
    return seen


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def increased(x: Tensor) -> Tensor:
    return x + 1


def cubed(x: Tensor) -> Tensor:
    return x**3


def test_activations_and_three_derivatives_are_those_of_plain_operations(
    no_kernels: dict[Any, Any],
) -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.tensor([0.1, -0.2, 0.3], requires_grad=True)

    def function(x: Tensor, bias: Tensor) -> Tensor:
        return bias_leaky_relu(x, bias, 0.2, gain=2**0.5, limit=1.0)

    expected = derivatives(function, (x, bias))
    with KernelCompiler(refuse):
        found = derivatives(function, (x, bias))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)
    # The value, A and L without and with a part for the bias; all derivatives are made of these.
    num = len(no_kernels)
    assert num == 3
    with KernelCompiler(refuse), torch.autocast("cpu", dtype=torch.bfloat16):
        again = derivatives(function, (x, bias))
    assert len(no_kernels) == num
    for value, other in zip(again, found, strict=True):
        assert torch.equal(value, other)


def test_there_is_a_kernel_for_each_form_however_many(graphs: list[GraphModule]) -> None:
    function = elementwise(scaled)
    with KernelCompiler(refuse), torch.no_grad():
        for _ in range(2):
            for size in range(1, 21):
                assert torch.equal(function(torch.ones(size), 2.0), torch.full((size,), 2.0))
        assert len(graphs) == 20
        assert torch.equal(function(torch.ones(1), 3.0), torch.tensor([3.0]))
        for x in (torch.ones(1).double(), torch.ones(4, 2), torch.ones(2, 4).T):
            assert torch.equal(function(x, 2.0), 2 * x)
        assert len(graphs) == 24
        function(torch.nn.Parameter(torch.ones(1)), 2.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            function(torch.ones(1), 2.0)
    assert len(graphs) == 24


def test_a_thread_of_the_engine_uses_the_same_kernels(graphs: list[GraphModule]) -> None:
    """As on CUDA: PyTorch's settings of its compiler are each thread's own."""
    function = elementwise(increased)

    def call() -> None:
        with torch.no_grad():
            for size in range(1, 21):
                assert torch.equal(function(torch.zeros(size)), torch.ones(size))

    with KernelCompiler(refuse), ThreadPoolExecutor(1) as thread:
        thread.submit(call).result()
        call()
    assert len(graphs) == 20


def test_what_autograd_records_is_not_compiled(graphs: list[GraphModule]) -> None:
    function = elementwise(cubed)
    x = torch.tensor(2.0, requires_grad=True)
    with KernelCompiler(refuse):
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
    assert second.item() == 12
    assert not graphs


def test_outside_of_a_compiler_functions_are_called_as_they_are(
    graphs: list[GraphModule],
) -> None:
    function = elementwise(increased)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError), KernelCompiler(refuse):
            _ = 1 / 0
        assert function(torch.ones(())) == 2
    assert not graphs


def test_without_a_compiler_it_is_told_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real one, of which only the program cannot be found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor import config

    told: list[str] = []
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), torch.no_grad():
        compiler = KernelCompiler(lambda error: told.append(str(error)))
        for size in (7, 7, 8):
            with compiler:
                x = torch.full((size, 2), -1.0)
                assert torch.equal(bias_leaky_relu(x, None, 0.5), x / 2)
    assert len(told) == 1
    assert "compiler" in told[0]
