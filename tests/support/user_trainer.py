"""A Tuner over a TorchTrainer, as users write them.

    python -m tests.support.user_trainer CONFIG FOLDER

Prints a JSON object with what Ray has of both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

import ganscale.ray

STEPS_KIMG = 0.32
TUNED_RATE = 1e-3


def trainer(settings: dict[str, Any], storage: Path, **options: Any) -> TorchTrainer:
    """One worker that trains the run that `settings` describe."""
    return TorchTrainer(
        ganscale.ray.train_loop_per_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=TrainRunConfig(
            name=settings["name"],
            storage_path=str(storage / "ray"),
            failure_config=FailureConfig(max_failures=1),
            **options,
        ),
    )


def main() -> None:
    """Train by a TorchTrainer, in a trial of a Tuner that chooses the learning rate."""
    config, storage = sys.argv[1], Path(sys.argv[2])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    settings = {"config": config, "storage": str(storage), "training.total_kimg": STEPS_KIMG}

    def trial(rates: dict[str, float]) -> None:
        callbacks = [TuneReportCallback()]
        result = trainer({**settings, **rates, "name": "tuned"}, storage, callbacks=callbacks).fit()
        assert result.checkpoint is not None
        with result.checkpoint.as_directory() as folder:
            pointer = json.loads(Path(folder, "ganscale.json").read_text())
        told = {"pointer": pointer, "ended_at": result.return_value.nimg, "metrics": result.metrics}
        (storage / "result.json").write_text(json.dumps(told))

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"optimizer.lr": tune.grid_search([TUNED_RATE])},
        run_config=tune.RunConfig(storage_path=str(storage / "tune"), verbose=0),
    )
    (tuned,) = tuner.fit()
    result = json.loads((storage / "result.json").read_text())
    print(json.dumps({**result, "tuned": tuned.metrics}))
    ray.shutdown()


if __name__ == "__main__":
    main()
