"""Folders of runs as training leaves them, written by hand for what reads them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ganscale.config import Config, load_config

BEGAN = 1_700_000_000.0
"""When the runs began, in seconds since 1970."""
_BATCH = 64


def row(step: int, *, attempt: int = 1) -> dict[str, Any]:
    """A row of metrics of a GAN with the names and types that training logs, a second a step."""
    return {
        "step": step,
        "nimg": _BATCH * step,
        "train/loss_D": 1.0 + 1 / step,
        "train/real_logits": 0.5,
        "train/fake_logits": -0.5,
        "train/loss_G": 2.0 - 1 / step,
        "train/grad_norm_D": 10.0 / step,
        "train/grad_norm_G": 5.0 + step % 3,
        "train/loss_scale_D": 1.0,
        "train/loss_scale_G": 1.0,
        "train/skips_D": 0,
        "train/skips_G": 0,
        "time/data_wait_seconds": 0.001,
        "time/discriminator_seconds": 0.06,
        "time/generator_seconds": 0.03,
        "workers/0/data_wait_seconds": 0.001,
        "time/images_per_second": 640.0 + step % 2,
        "attempt": attempt,
        "time/unix": BEGAN + step,
    }


def begin(
    attempt: int = 1, *, step: int = 0, seconds: float = 0.0, reason: str = "start", **more: Any
) -> dict[str, Any]:
    """The event that begins an attempt."""
    return {
        "time": BEGAN + seconds,
        "event": reason,
        "attempt": attempt,
        "nimg": _BATCH * step,
        "step": step,
        "checkpoint": None,
        "num_rollbacks": 0,
        "world_size": 2,
        "pid": 1,
        "precision": "fp32",
        "device": "cpu",
        "wandb": "offline",
        **more,
    }


def checkpoint(step: int, *, attempt: int = 1) -> dict[str, Any]:
    """The event of a checkpoint."""
    return {
        "time": BEGAN + step + 0.5,
        "event": "checkpoint",
        "attempt": attempt,
        "nimg": _BATCH * step,
        "path": f"checkpoints/nimg-{_BATCH * step:012d}-a{attempt:04d}",
        "stall_seconds": 0.002,
        "write_seconds": 0.05,
    }


def end(step: int, *, attempt: int = 1) -> dict[str, Any]:
    """The event of a run that has reached its length."""
    return {
        "time": BEGAN + step + 1,
        "event": "end",
        "attempt": attempt,
        "nimg": _BATCH * step,
        "step": step,
        "reason": "",
    }


def noise_grid(
    path: Path, *, columns: int = 8, rows: int = 8, side: int = 32, count: int | None = None
) -> None:
    """A grid as training draws them, of noise, which no format makes smaller."""
    random = np.random.default_rng(zlib.crc32(path.name.encode()))
    period = side + 1
    pixels = np.zeros((rows * period + 1, columns * period + 1, 3), dtype=np.uint8)
    for number in range(columns * rows if count is None else count):
        top, left = 1 + number // columns * period, 1 + number % columns * period
        image = random.integers(1, 256, (side, side, 3), dtype=np.uint8)
        pixels[top : top + side, left : left + side] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_run(
    root: Path,
    rows: Iterable[Mapping[str, Any]] = (),
    events: Iterable[Mapping[str, Any]] = (),
    *,
    config: Config | None = None,
    samples: Sequence[int] = (),
) -> Path:
    """Write a run's folder; `samples` are the steps at which grids of samples were drawn."""
    root.mkdir(parents=True, exist_ok=True)
    config = load_config("quickstart") if config is None else config
    (root / "config.yaml").write_text(config.to_yaml())
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in samples:
        noise_grid(root / "samples" / f"kimg-{_BATCH * step / 1000:09.3f}.png")
    return root
