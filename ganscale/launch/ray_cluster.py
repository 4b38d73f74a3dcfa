"""The Ray cluster that a run uses: one that is joined, or one that is started on this machine."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from ganscale.config import Config
from ganscale.errors import ConfigError, GanscaleError

# Read by Ray Train: workers stay where paths are valid, a fault is noticed in a second, a worker
# that does not answer is given up in time, a group that does not fit is not waited for.
_RAY_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Read by a cluster that is started here; one that is joined has its own.
_OWN_CLUSTER = {
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "disabled",
    # Nobody takes this machine away with a notice, and the watcher is one more process to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_INIT_OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_ANSWER_SECONDS = 20.0
"""A head may be restarting; ray.init itself waits for minutes, with a page of warnings."""
_CONNECT_SECONDS = 5.0
# What a client of HTTP/2, and so of gRPC, says first: a fixed preface and an empty SETTINGS frame.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS_FRAME = 4


class _OwnRay:
    """Ray on this machine, started by a thread while the caller does something else.

    The thread lives as long as this process: the kernel ends Ray's processes with the thread that
    started them.
    """

    def __init__(self) -> None:
        self._is_up = threading.Event()
        self._problem: BaseException | None = None
        threading.Thread(target=self._start, name="ray-start", daemon=True).start()

    def wait(self) -> None:
        """Until Ray is up. Raises what its start raised."""
        self._is_up.wait()
        if self._problem is not None:
            raise self._problem

    def end(self) -> None:
        """End Ray once it is up. That it did not start is no problem of a caller that has not used
        it, and whose own error would be lost."""
        self._is_up.wait()
        ray.shutdown()

    def _start(self) -> None:
        for name, value in {**_RAY_ENVIRONMENT, **_OWN_CLUSTER}.items():
            os.environ.setdefault(name, value)
        # There is no dashboard. Ray Train's cleaner of placement groups asks it all the time, waits
        # for it in vain, and keeps a run from ending for 12 s. At an address where nothing listens
        # it is refused at once; one that the user has set would be that of another cluster.
        os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"
        try:
            # Without "local" Ray would join what was started here last, even if that is long gone.
            ray.init(address="local", include_dashboard=False, **_INIT_OPTIONS)
        except BaseException as error:
            self._problem = error
        self._is_up.set()
        threading.Event().wait()


_own_ray: _OwnRay | None = None
"""One that was started early and that nobody has used yet."""


@contextmanager
def started_early(config: Config) -> Iterator[None]:
    """While the block runs, begin to start Ray where `cluster` will start it here: it takes some
    seconds, in which the block may import torch. Ends it again if the block has not used it.

    Nothing is started where shards have to be built first, or a mistake is likely to end the run.
    """
    global _own_ray
    is_own = not (config.launch.ray_address or os.environ.get("RAY_ADDRESS"))
    built = Path(config.data.shards or "", "index.json").is_file() or any(
        Path(config.storage).expanduser().glob("shards/*-train/index.json")
    )
    if config.launch.backend == "ray" and is_own and built and not ray.is_initialized():
        _own_ray = _OwnRay()
    try:
        yield
    finally:
        unused, _own_ray = _own_ray, None
        if unused is not None:
            unused.end()


@contextmanager
def cluster(address: str | None) -> Iterator[bool]:
    """Be connected to Ray while the block runs; yields whether the cluster was there before and may
    have other hosts.

    Uses the cluster at `address` or RAY_ADDRESS, else starts Ray here without a dashboard and ends
    it afterwards. Raises `GanscaleError` if no cluster answers at the address.
    """
    global _own_ray
    early, _own_ray = _own_ray, None
    if ray.is_initialized() and early is None:
        yield True
        return
    setting = "launch.ray_address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        for name, value in _RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _require_answer(address, setting)
        try:
            ray.init(address=address, **_INIT_OPTIONS)
        except (ConnectionError, ValueError) as error:  # of "auto", or of no address at all
            reason = " ".join(str(error).split())[:200]
            raise GanscaleError(f"{setting}={address} cannot be joined: {reason}") from error
    else:
        (early or _OwnRay()).wait()
    try:
        yield bool(address)
    finally:
        ray.shutdown()


def worker_takes(config: Config) -> dict[str, float]:
    """Resources of Ray that one worker of a run takes."""
    launch = config.launch
    return {"CPU": launch.cpus_per_worker, **({"GPU": 1.0} if launch.use_gpu else {})}


def num_fitting(takes: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers fit on nodes with these resources; a worker is on one node."""
    # Ray's fractions are of 1/10000, so what is left may be a little less than a whole.
    return sum(
        int(min(node.get(kind, 0.0) / amount for kind, amount in takes.items()) + 1e-6)
        for node in nodes
    )


def num_workers_fitting(config: Config) -> int:
    """How many workers of a run fit on the cluster as it is now, if nothing else ran there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return num_fitting(worker_takes(config), nodes)


def require_capacity(config: Config) -> None:
    """Raise `ConfigError` if the run does not fit on a Ray that cannot grow, however long it waits.

    That is one which was started here.
    """
    takes, launch = worker_takes(config), config.launch
    there = ray.cluster_resources()
    fitting = num_workers_fitting(config)
    if fitting >= launch.min_workers:
        return
    wanted = {kind: amount * launch.min_workers for kind, amount in takes.items()}
    if launch.use_gpu and not there.get("GPU"):
        fix = "set launch.use_gpu=false, or launch.ray_address to a cluster with GPUs"
    elif fitting:
        fix = f"set launch.num_workers={fitting}, or launch.ray_address to a larger cluster"
    else:
        fix = "set a smaller launch.cpus_per_worker, or launch.ray_address to a larger cluster"
    raise ConfigError(
        f"launch.num_workers={launch.min_workers} needs {resources_text(wanted, wanted)}, but this "
        f"machine has {resources_text(there, wanted)}: {fix}"
    )


def resources_text(amounts: Mapping[str, float], kinds: Iterable[str]) -> str:
    """Amounts of some kinds of resources, such as "2 CPU and 0 GPU"."""
    return " and ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in kinds)


def _require_answer(address: str, setting: str) -> None:
    """Raise an error unless something that may be the head of a cluster answers at an address."""
    if "://" in address:
        raise ConfigError(
            f"{setting}={address}: expected host:port of the cluster's head, which is 6379 unless "
            "it was started with another port; URLs are for ganscale submit --address"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", which Ray looks up, or nothing that Ray takes
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        try:
            problem = _problem_at(host.strip("[]"), int(port))
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem:
            return
        if time.monotonic() > deadline:
            raise GanscaleError(
                f"no Ray cluster answers at {setting}={address} ({problem}): start its head, "
                f"correct the address, or unset {setting} to start Ray on this machine"
            )
        time.sleep(1.0)


def _problem_at(host: str, port: int) -> str:
    """Why what listens at a port cannot be Ray's head; empty if it can be. Raises `OSError`."""
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return ""  # gRPC is inside TLS, which Ray itself sets up
        connection.sendall(_HTTP2_PREFACE)
        answer = connection.recv(4)
    is_grpc = len(answer) == 4 and answer[3] == _SETTINGS_FRAME
    return "" if is_grpc else "another server listens there"
