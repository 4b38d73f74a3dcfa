"""Runs the steps: on CUDA each form of a step is captured once as a graph and replayed.

A small GAN's step is hundreds of kernels of microseconds, and the host needs longer to launch them
than the card to run them: on an H100 a DCGAN's step takes 62 ms launched one by one and 1.7 ms as a
graph. A step is a function of tensors, so what it computes does not depend on how it is launched:
a replay has the bits of the same step launched anew. On the CPU there is nothing to capture, and
the same function is called.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import distributed as dist

from ganscale.errors import ConfigError
from ganscale.training.inputs import HostInputs, PackedInputs
from ganscale.training.step_inputs import StepVariant
from ganscale.training.watchdog import Phase

_STEPS_BEFORE_CAPTURE = 3
"""Of each form: they make what is made once, such as moments, filters and workspaces."""
_FIRST_CAPTURE = 11
"""Steps before any capture: DistributedDataParallel times its first ten iterations by events."""
_MAX_GRAPHS = 16
"""A rank that reads parts of many sizes has many forms; further ones are launched."""

Update = Callable[[PackedInputs, StepVariant, Callable[[Phase], None]], None]
"""All that a step does on the device, given its inputs there."""


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Run it again on what its inputs hold now."""
        ...


Capture = Callable[[Callable[[], None]], Graph]
"""Records what a function launches, without computing it. Raises `RuntimeError` if it cannot."""


class CudaCapture:
    """Records on the current stream, which must not be the default one."""

    def __init__(self) -> None:
        # One pool of memory for all graphs: no two run at once, and none keeps a result in it.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=torch.cuda.current_stream(),
            # Other threads, such as the writer of checkpoints, go on using CUDA meanwhile.
            capture_error_mode="thread_local",
        ):
            step()
        return graph


def choose_capture(mode: Literal["auto", "on", "off"], device: torch.device) -> Capture | None:
    """What captures steps on the device of the process group; None where each is launched anew.

    `mode` is `training.cuda_graphs`. Raises `ConfigError` if it is "on" and they cannot be captured
    because ranks share a GPU.
    """
    if device.type != "cuda" or mode == "off":
        return None
    # Gloo copies tensors to the host and waits for them there, which no graph can replay.
    if "cuda:nccl" in dist.get_backend_config():
        return CudaCapture()
    if mode == "on":
        raise ConfigError(
            "training.cuda_graphs=on, but ranks share a GPU and exchange tensors by way of the "
            "host: give each rank a GPU of its own, or set training.cuda_graphs=auto"
        )
    return None


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """On CUDA a stream beside the default one, which cannot be captured.

    All of training happens on it: a captured backward runs on the streams of the forward, and those
    on which DistributedDataParallel was built.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


class StepRunner:
    """Runs one rank's steps.

    Args:
        update: what a step does.
        device: where.
        enter: is called when a part of the step begins; a graph is one part.
        capture: makes graphs; None launches each step anew.
        must_capture: a step that cannot be captured ends the run. Otherwise there is a warning, and
            steps are launched one by one from then on.
        recover: is called after a failed capture, to clear what it left in objects of the host.
    """

    def __init__(
        self,
        update: Update,
        device: torch.device,
        *,
        enter: Callable[[Phase], None],
        capture: Capture | None = None,
        must_capture: bool = False,
        recover: Callable[[], None] = lambda: None,
    ) -> None:
        self._update = update
        self._device = device
        self._enter = enter
        self._capture = capture
        self._must_capture = must_capture
        self._recover = recover
        self._graphs: dict[Hashable, tuple[PackedInputs, Graph]] = {}
        self._launched: Counter[Hashable] = Counter()

    def run(self, host: HostInputs) -> None:
        """Take the step; on CUDA it is under way when this returns."""
        self._wait_for_readers()
        if self._capture is not None and self._is_time_to_capture(host.form):
            self._try_to_capture(host, self._capture)
        if host.form not in self._graphs:
            self._launched[host.form] += 1
            self._update(host.packed.to(self._device), host.variant, self._enter)
            return
        inputs, graph = self._graphs[host.form]
        # On the same stream, so the copy waits until the last replay has read what was there.
        inputs.buffer.copy_(host.packed.buffer, non_blocking=True)
        self._enter("step")
        graph.replay()

    def _is_time_to_capture(self, form: Hashable) -> bool:
        return (
            form not in self._graphs
            and len(self._graphs) < _MAX_GRAPHS
            and self._launched[form] >= _STEPS_BEFORE_CAPTURE
            and self._launched.total() >= _FIRST_CAPTURE
        )

    def _try_to_capture(self, host: HostInputs, capture: Capture) -> None:
        inputs = host.packed.to(self._device)
        try:
            graph = capture(lambda: self._update(inputs, host.variant, lambda phase: None))
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            if self._must_capture:
                raise
            self._capture = None
            self._recover()
            reason = str(error).strip().split("\n")[0]
            warnings.warn(
                f"a step could not be captured as a CUDA graph, so steps are launched one by one "
                f"from here on, which is slower: {reason} (training.cuda_graphs=off silences this)",
                stacklevel=2,
            )
        else:
            self._graphs[host.form] = (inputs, graph)

    def _wait_for_readers(self) -> None:
        """Images that are kept on the device are put there by threads on the default stream."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
