"""The run that a soak harms, and the one that it is compared with."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every soak."""
    parser.add_argument("--shards", type=Path, required=True, help="Folder of a shard set.")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="Where runs go.")
    parser.add_argument("--kimg", type=float, default=60.0, help="Length of the run.")


def small_run(arguments: argparse.Namespace, name: str, **changes: Any) -> Config:
    """A small DCGAN with two workers and a checkpoint every 20 steps; `__` stands for a dot."""
    return Config().with_changes(
        {
            "name": name,
            "storage": str(arguments.storage.absolute()),
            "data.shards": str(arguments.shards.absolute()),
            "model": {"base_channels": 16},
            "training.batch_size": 32,
            "training.total_kimg": arguments.kimg,
            "checkpoint.every_kimg": 0.64,
            "tracking.log_every_kimg": 0.064,
            "tracking.wandb": "disabled",
            "samples.every_kimg": 10,
            "launch.num_workers": 2,
            "launch.max_failures": -1,  # kills may come faster than checkpoints
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )


def write_config(config: Config) -> Path:
    """The file that `ganscale train --config` takes."""
    file = config.run_dir.parent / f"{config.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config.to_yaml())
    return file


def train_undisturbed(arguments: argparse.Namespace) -> Config:
    """The same run as two plain processes; made once for each length, and kept."""
    name = f"soak-undisturbed-{arguments.kimg:g}"
    config = small_run(arguments, name, launch__backend="inprocess")
    if not CheckpointStore(config.checkpoints).names():
        print("the undisturbed run ...", flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "ganscale", "train"]
        command += ["--config", str(write_config(config))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return config


def newest(config: Config) -> tuple[int, str]:
    """(nimg, sha256 over all tensors) of the newest checkpoint."""
    files = CheckpointStore(config.checkpoints).newest()
    if files is None:
        sys.exit(f"{config.checkpoints} has no checkpoint that verifies")
    return files.name.nimg, files.meta["tensors_sha256"]
