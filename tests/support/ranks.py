"""Run a function as every rank of a small world, each in a process of its own."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

from ganscale.world import World, process_group
from tests.support.processes import FORKED

_TIMEOUT_SECONDS = 120.0


def free_port() -> int:
    """A TCP port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, device: str = "cpu"
) -> list[Any]:
    """`function(world, *args)` on every rank, in a gloo group; the results in rank order.

    With `device="cuda:0"` all ranks compute on that one GPU. Results must be plain Python (no
    tensors). Raises `RuntimeError` with the rank's traceback.
    """
    results: Queue[tuple[int, Any, str | None]] = FORKED.Queue()
    # The server's environment is that of the test which came first.
    variables = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        FORKED.Process(
            target=_rank_main,
            args=(World(rank, rank, world_size, device), variables, results, function, args),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        collected: dict[int, Any] = {}
        for _ in processes:
            rank, value, problem = results.get(timeout=_TIMEOUT_SECONDS)
            if problem is not None:
                raise RuntimeError(f"rank {rank} failed:\n{problem}")
            collected[rank] = value
        for process in processes:
            process.join(_TIMEOUT_SECONDS)
    finally:
        for process in processes:
            process.kill()
    return [collected[rank] for rank in range(world_size)]


def _rank_main(
    world: World,
    variables: dict[str, str],
    results: Queue[tuple[int, Any, str | None]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(variables, RANK=str(world.rank), LOCAL_RANK=str(world.rank))
    try:
        with process_group(world, timeout_seconds=60):
            results.put((world.rank, function(world, *args), None))
    except Exception:
        results.put((world.rank, None, traceback.format_exc()))
