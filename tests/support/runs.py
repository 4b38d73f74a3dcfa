"""Read back what a run wrote, and start runs as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from tests.support.processes import Command
from tests.support.ranks import free_port


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; half a line, of a killed or a busy writer, is none."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def final_digest(config: Config) -> tuple[int, str]:
    """(nimg, sha256 over all tensors) of the newest checkpoint, which must verify."""
    store = CheckpointStore(config.checkpoints)
    files = store.read(store.lineage()[0])
    return files.meta["nimg"], files.meta["tensors_sha256"]


def start_ranks(config: Config, world_size: int) -> list[Command]:
    """`ganscale train` as `world_size` processes, with the environment that torchrun gives them."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir.parent / f"{config.name}.yaml"
    file.write_text(config.with_changes({"launch.num_workers": world_size}).to_yaml())
    port = free_port()
    return [
        Command(
            "train",
            "--config",
            str(file),
            variables={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(world_size)
    ]


def wait_all(processes: list[Command], timeout: float = 600) -> None:
    """Wait until all have ended well; the error output of one that has not is in the failure."""
    for process in processes:
        _, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str] | Command) -> None:
    """Wait until a file has `count` complete lines, while `process` lives."""
    deadline = time.monotonic() + 600
    while len(read_rows(path)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} has too few rows after ten minutes"
        time.sleep(0.005)


@contextmanager
def own_ray() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("train", ...)` is a ganscale with a Ray of its own, and is killed at the end.

    A cluster that is long gone is noted where Ray looks for one, and must not be joined.
    """
    drivers = []
    # Short, as Ray makes sockets in it; and it may still be writing there.
    with tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")

        def start(*arguments: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
            driver = subprocess.Popen(
                [sys.executable, "-m", "ganscale", *arguments],
                env={**os.environ, "RAY_TMPDIR": folder},
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
            drivers.append(driver)
            return driver

        try:
            yield start
        finally:
            for driver in drivers:
                driver.kill()
                driver.communicate()
