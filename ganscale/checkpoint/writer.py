"""Checkpoints that do not stop training: copied to the host, then written in the background.

Training waits for the copy alone, a memcpy into buffers that are reused each time. At most one
checkpoint is in flight, because a second one would need another copy of the state in host memory.
The next one waits for it, unless the store is failing; then the older one is given up in favour of
the newer. A failing store is retried with backoff. After that training goes on without a new
checkpoint, and ends only when none has become durable for `max_staleness_seconds`, since everything
it computes from there on may be lost.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ganscale.checkpoint.encoding import flatten
from ganscale.checkpoint.files import SavedState
from ganscale.checkpoint.lineage import Attempt, CheckpointName
from ganscale.checkpoint.store import CheckpointStore, Retention, Superseded
from ganscale.errors import CheckpointError
from ganscale.storage import RetryPolicy, one_line, retry

# Whatever a store raises is noted, and the next checkpoint is tried. These are bugs of this
# program, and a run that hid them would train on without any checkpoint.
_PROGRAMMING_ERRORS = (AssertionError, AttributeError, NameError, TypeError)


@dataclass(frozen=True)
class SaveResult:
    """Whether a checkpoint was written, and if not, why."""

    nimg: int
    name: CheckpointName | None
    """None if it could not be written."""
    problem: str
    """Why not, in one line; else empty."""
    stall_seconds: float
    """How long training waited for it."""
    write_seconds: float
    """How long it took in the background."""


class HostCopy:
    """Copies of named tensors on the host, in buffers that the next copy overwrites.

    Page-locked memory, which asynchronous copies from a GPU need, is slow to allocate. So it is
    allocated once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now. The copies of the call before are overwritten."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        self._buffers = copies  # and no more: a tensor that is gone frees its buffer
        # All copies run at the same time and are waited for together: training must not change a
        # tensor that is still being copied.
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return dict(copies)


class BackgroundWriter:
    """Writes the checkpoints of one attempt.

    `submit`, `results` and `finish` belong to the training thread. The last two raise `Superseded`
    when a newer attempt has begun, and `CheckpointError` when the run has been without a durable
    checkpoint for too long; the writing thread itself never ends a run.
    """

    def __init__(
        self,
        store: CheckpointStore,
        attempt: Attempt,
        retention: Retention,
        policy: RetryPolicy,
        *,
        max_staleness_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.attempt = attempt
        self.retention = retention
        self.policy = policy
        self.max_staleness_seconds = max_staleness_seconds
        self._clock = clock
        self._durable_at = clock()
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._give_up = threading.Event()
        self._results: deque[SaveResult] = deque()
        self._error: BaseException | None = None
        self.last_problem = ""
        """Why the last checkpoint could not be written; empty if it was."""

    def submit(self, nimg: int, state: Any, meta: Mapping[str, Any], **more: Any) -> None:
        """Take a copy of `state` and write it in the background as the checkpoint at `nimg`.

        `more` are further fields of `SavedState`. Waits for the checkpoint before, if it is still
        being written; if that fails, it is not retried.
        """
        began = time.perf_counter()
        # Ends the waiting between two tries, not a try that is under way. So a store that works
        # gets its checkpoint done, and one that fails does not hold training up.
        self._give_up.set()
        self._join()
        tree, tensors = flatten(state)
        saved = SavedState(nimg, tree, self._host.take(tensors), meta, **more)
        self._give_up.clear()
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(saved, stall), name="checkpoint", daemon=True
        )
        self._thread.start()

    def results(self) -> list[SaveResult]:
        """What became of the checkpoints that have ended since the last call."""
        if self._error is not None:
            raise self._error
        results = [self._results.popleft() for _ in range(len(self._results))]
        for result in results:
            if result.name is not None:
                self._durable_at = self._clock()
            elif self._clock() - self._durable_at > self.max_staleness_seconds:
                raise CheckpointError(
                    f"no checkpoint could be written to {self.store.location} for "
                    f"{(self._clock() - self._durable_at) / 60:.1f} minutes "
                    f"(checkpoint.max_staleness_minutes); last: {result.problem}"
                )
        return results

    def finish(self) -> list[SaveResult]:
        """Wait for the checkpoint in flight, for as long as the policy retries it."""
        self._join()
        return self.results()

    def close(self) -> None:
        """End soon: a write that is under way may finish, but a failed one is not retried."""
        self._give_up.set()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: SavedState, stall_seconds: float) -> None:
        began = time.perf_counter()
        name, problem = None, ""
        try:
            name, problem = self._try_until_deadline(state)
            # In this order: an older checkpoint goes only when the newer one is durable.
            if name is not None:
                self._prune(state)
        except (Superseded, *_PROGRAMMING_ERRORS) as error:
            self._error = error
            problem = str(error)
        seconds = time.perf_counter() - began
        self.last_problem = problem
        self._results.append(SaveResult(state.nimg, name, problem, stall_seconds, seconds))

    def _try_until_deadline(self, state: SavedState) -> tuple[CheckpointName | None, str]:
        failure = f"the checkpoint at {state.nimg / 1000:g} kimg could not be written"
        try:
            name = retry(
                lambda: self.store.write(self.attempt, state),
                self.policy,
                failure,
                wait=self._give_up.wait,
            )
        except (Superseded, *_PROGRAMMING_ERRORS):
            raise
        except Exception as error:
            return None, one_line(error.__cause__ or error)[:300]
        return name, ""

    def _prune(self, state: SavedState) -> None:
        try:
            self.store.prune(self.attempt, self.retention, state.healthy_nimg)
        except (Superseded, *_PROGRAMMING_ERRORS):
            raise
        except Exception:  # what is left costs only space, and the next prune removes it
            pass
