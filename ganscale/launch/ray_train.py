"""Train under Ray Train: DDP workers on this machine or a cluster, restarted after a fault.

Ray starts and restarts the workers; which checkpoint they go on from is decided by our manifests,
so nothing is reported through Ray but the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ganscale.config import Config
from ganscale.errors import GanscaleError
from ganscale.world import World

__all__ = ["train_on_ray"]

# Read by Ray when it starts: workers stay where paths are valid, a fault is noticed in a second.
_RAY_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def train_on_ray(config: Config) -> None:
    """Run the training loop in `launch.num_workers` Ray workers and wait for the end.

    Uses the cluster at `launch.ray_address` or RAY_ADDRESS, else starts Ray here without a
    dashboard and ends it afterwards. Raises `GanscaleError` with the worker's message when training
    failed for good.
    """
    launch = config.launch
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump()},
        torch_config=TorchConfig(timeout_s=int(launch.timeout_seconds)),
        scaling_config=ScalingConfig(
            num_workers=launch.num_workers,
            use_gpu=launch.use_gpu,
            resources_per_worker={"CPU": launch.cpus_per_worker, **_gpu(launch.use_gpu)},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=launch.max_failures),
        ),
    )
    with _cluster(launch.ray_address):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise GanscaleError(_first_message(error)) from error


def _gpu(use_gpu: bool) -> dict[str, float]:
    return {"GPU": 1.0} if use_gpu else {}


def _worker(settings: dict[str, Any]) -> None:
    from ganscale.training.loop import train

    config = Config.model_validate(settings["config"])
    train(config, World.detect("cuda" if config.launch.use_gpu else "cpu"))


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **options)
    else:
        for name, value in _RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init(include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _first_message(error: TrainingFailedError) -> str:
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = sorted(error.worker_failures.items())[0]
        lines = str(failure).strip().splitlines() or [repr(failure)]
        last = lines[-1].strip("'")
        return f"training failed on rank {rank}: {last}"
    return f"training failed: {' '.join(str(error).split())[:500]}"
