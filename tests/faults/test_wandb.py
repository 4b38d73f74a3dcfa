"""W&B offline files after a kill: hardly a row is missing, and restarts belong to one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.runs import read_rows, start_ranks, wait_all, wait_for_rows


def _records(file: Path) -> list[dict[str, Any]]:
    """The records of an offline file, read by wandb's own tool, which bears a cut-off end."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def _metric_steps(file: Path) -> list[int]:
    steps = []
    for record in _records(file):
        if record["type"] == "history":
            row = record["history"]["item"]
            if "train/loss_D" in row:
                steps.append(row["step"])
    return steps


def test_kill_loses_at_most_one_row_and_resume_keeps_the_run_id(make_config: MakeConfig) -> None:
    config = make_config(
        tracking__wandb="offline",
        tracking__log_every_kimg=0.064,
        checkpoint__every_kimg=0.128,
        training__total_kimg=1.28,
    )
    run_dir = RunDirectory(config.run_dir)
    (rank,) = start_ranks(config, 1)
    wait_for_rows(run_dir.metrics, 9, rank)
    os.kill(rank.pid, signal.SIGKILL)
    rank.communicate()
    logged = [row["step"] for row in read_rows(run_dir.metrics)]
    assert logged == list(range(4, 4 * len(logged) + 1, 4))
    (first,) = sorted(run_dir.root.glob("wandb/offline-run-*/*.wandb"))
    kept = _metric_steps(first)
    assert len(kept) >= len(logged) - 1
    assert kept == logged[: len(kept)]

    wait_all(start_ranks(config, 1))
    files = sorted(run_dir.root.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    ids = {r["run"]["run_id"] for f in files for r in _records(f) if r["type"] == "run"}
    assert ids == {(run_dir.root / "wandb_run_id").read_text()}
    assert _metric_steps(files[1])[-1] == 80
