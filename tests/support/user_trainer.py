"""A user's own TorchTrainer, and a Tuner over it: `python -m tests.support.user_trainer SHARDS`.

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
    """Two workers that train the run that `settings` describe."""
    return TorchTrainer(
        ganscale.ray.train_loop_per_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=TrainRunConfig(
            name=settings["name"],
            storage_path=str(storage / "ray"),
            failure_config=FailureConfig(max_failures=1),
            **options,
        ),
    )


def main() -> None:
    """Train once by hand, then with another learning rate by a Tuner."""
    config, storage = sys.argv[1], Path(sys.argv[2])
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    settings = {"config": config, "storage": str(storage), "training.total_kimg": STEPS_KIMG}
    result = trainer({**settings, "name": "by-hand"}, storage).fit()

    def trial(rates: dict[str, float]) -> None:
        name = f"rate-{rates['optimizer.lr']:g}"
        callbacks = [TuneReportCallback()]
        trainer({**settings, **rates, "name": name}, storage, callbacks=callbacks).fit()

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"optimizer.lr": tune.grid_search([TUNED_RATE])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(storage / "tune"), verbose=0),
    )
    trials = tuner.fit()
    with result.checkpoint.as_directory() as folder:
        pointer = json.loads(Path(folder, "ganscale.json").read_text())
    print(
        json.dumps(
            {
                "pointer": pointer,
                "ended_at": result.return_value.nimg,
                "metrics": result.metrics,
                "errors": trials.num_errors,
                "tuned": [trial.metrics for trial in trials],
            }
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
