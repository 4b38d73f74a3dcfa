"""Processes that build or read the shards of a set, as many at once as there are cores.

They are started by a process of their own and not by the program that builds:

    python -P -m ganscale.data.shard_pool < jobs > shards

Processes that `multiprocessing` starts anew import the main module of their program. A script that
trains or builds at its top level, without `if __name__ == "__main__"`, would do so again in each of
them, and wait for itself. The process here imports what the jobs need, once, and forks before it
has a thread: the program could not, since it has threads (progress, torch), and a fork copies their
locks in whatever state they are.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from ganscale.errors import DataError

# Not imported by the pool itself, which imports what its jobs are made of.
if TYPE_CHECKING:
    from ganscale.data.shard_writer import BuiltShard


def run_in_processes(
    function: Callable[..., BuiltShard],
    jobs: Sequence[tuple[Any, ...]],
    progress: Callable[[int], None],
) -> list[BuiltShard]:
    """`function(*job)` of each job, in the order of the jobs.

    `progress` is called with the number of samples of each shard when that is done. Raises what a
    job raises, and `DataError` if a process was killed. When this returns or raises, no process
    writes any more.
    """
    command = [sys.executable, "-P", "-m", __name__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    pipe = subprocess.PIPE
    built: dict[int, BuiltShard] = {}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as pool:
        assert pool.stdin is not None
        assert pool.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, as the end of its output says
                pickle.dump((function, jobs), pool.stdin)
                pool.stdin.flush()
            # Progress in the order of completion, results in the order of the jobs: the index must
            # not depend on which process was faster.
            while len(built) < len(jobs):
                number, outcome = _next_outcome(pool.stdout)
                if isinstance(outcome, BrokenProcessPool):
                    raise DataError(
                        "a building process was killed (out of memory?); run again to go on from "
                        "here"
                    )
                if isinstance(outcome, BaseException):
                    raise outcome
                built[number] = outcome
                progress(outcome.shard.num_samples)
        finally:
            with suppress(BrokenPipeError):
                pool.stdin.close()  # which ends all processes, also in the middle of a job
            pool.stdout.read()  # until the last of them, which all hold its other end, has ended
    return [built[number] for number in range(len(jobs))]


def _next_outcome(stream: IO[bytes]) -> tuple[int, Any]:
    """The number of a job and what it returned or raised."""
    try:
        number, outcome = pickle.load(stream)
    except (EOFError, pickle.UnpicklingError):
        return -1, BrokenProcessPool()
    return number, outcome


def main() -> None:
    """Do the jobs of standard input, and write what became of each to standard output."""
    # A terminal's Ctrl-C reaches the program too, which then closes standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library may print must not come between the results.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    function, jobs = pickle.load(sys.stdin.buffer)
    workers = num_processes(len(jobs))
    context = get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_pool) as pool:
        numbers = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        # After all processes were forked, with the first job.
        Thread(target=_end_with_program, daemon=True).start()
        for future in as_completed(numbers):
            error = future.exception()
            if error is not None and error.__cause__ is not None:
                error.add_note(str(error.__cause__))  # where it was raised; pickling drops a cause
            pickle.dump((numbers[future], error or future.result()), results)
            results.flush()


def num_processes(num_jobs: int) -> int:
    """One for each job, but no more than there are cores."""
    # Those that this process may run on: in a container, or under Slurm, fewer than the machine's.
    return min(num_jobs, len(os.sched_getaffinity(0)))


def _end_with_program() -> None:
    """End this process when the program closes standard input, or was killed."""
    os.read(0, 1)  # not through `sys.stdin`, whose lock would be held when Python ends
    os._exit(1)


def _end_with_pool() -> None:
    """End this process when the pool's ends, also in the middle of a job.

    Else it would go on writing into the folder in which the next build continues.
    """
    parent = parent_process()
    assert parent is not None, "runs in a process of the pool"

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
