"""`ganscale.ray.train_loop_per_worker` in a TorchTrainer and a Tuner that a user has written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import MakeConfig
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all
from tests.support.user_trainer import STEPS_KIMG, TUNED_RATE


@pytest.mark.timeout(900)  # far less on a quiet machine
def test_rows_reach_ray_and_weights_are_those_of_ganscale_train(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(name="plain", tracking__log_every_kimg=0.064)
    file = tmp_path / "base.yaml"
    file.write_text(config.to_yaml())
    with tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder:
        found = subprocess.run(
            [sys.executable, "-m", "tests.support.user_trainer", str(file), str(tmp_path)],
            # Else workers are nicer than the tests beside this one, and wait for them.
            env={**os.environ, "RAY_TMPDIR": folder, "RAY_worker_niceness": "0"},
            capture_output=True,
            text=True,
            timeout=840,
        )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    changes = {"training.total_kimg": STEPS_KIMG, "optimizer.lr": TUNED_RATE}
    tuned = config.with_changes({**changes, "name": "tuned", "storage": str(tmp_path)})
    rows = read_rows(tuned.run_dir / "metrics.jsonl")
    assert told["ended_at"] == rows[-1]["nimg"] == round(1000 * STEPS_KIMG)
    # What Ray has of both is the last row, but for the time at which the file got it.
    for metrics in (told["metrics"], told["tuned"]):
        shared = metrics.keys() & rows[-1].keys()
        assert {"nimg", "step", "train/loss_D", "train/loss_G"} <= shared
        assert all(metrics[name] == rows[-1][name] for name in shared)

    (newest,) = (tuned.run_dir / "checkpoints").glob(f"nimg-*{rows[-1]['nimg']}-*")
    assert told["pointer"] == {"run": str(tuned.run_dir), "checkpoint": str(newest)}

    expected = config.with_changes(changes)
    wait_all(start_ranks(expected, 1))
    assert final_digest(tuned) == final_digest(expected)
