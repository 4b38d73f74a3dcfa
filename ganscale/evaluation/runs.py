"""What a run says of its own evaluation: which reference, and where the figures go."""

from __future__ import annotations

import time
from pathlib import Path

from ganscale.config import load_config
from ganscale.errors import ConfigError
from ganscale.evaluation.distribution import Evaluation
from ganscale.evaluation.images import GeneratedImages, ImageSet
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import read_lines
from ganscale.tracking.sinks import EventLog, JsonlSink

__all__ = ["default_reference", "note_in_run"]


def default_reference(subject: str) -> str:
    """The shards that the run trains on, from its folder or from a snapshot within it.

    Raises `ConfigError` if `subject` is neither.
    """
    path = Path(subject).expanduser().absolute()
    for folder in (path, *path.parents):
        config = RunDirectory(folder).config
        if config.is_file():
            shards = load_config(config).data.shards
            if shards is not None:
                return shards
    raise ConfigError(f"{subject} is not part of a run that names its data: give --reference")


def note_in_run(run: Path, samples: ImageSet, found: Evaluation) -> None:
    """Append the figures to the run's rows of metrics, and the protocol to its events."""
    assert isinstance(samples, GeneratedImages)
    run_dir = RunDirectory(run.expanduser().absolute())
    nimg = int(samples.generator.info["nimg"])
    sink, events = JsonlSink(run_dir.metrics), EventLog(run_dir.events)
    attempt = _last_attempt(run_dir)
    sink.log({"nimg": nimg, **found.row(), "attempt": attempt, "time/unix": time.time()})
    events.write("evaluation", attempt=attempt, nimg=nimg, **found.to_json())
    sink.close()
    events.close()


def _last_attempt(run_dir: RunDirectory) -> int:
    """The attempt that wrote the last row; 0 without rows."""
    rows = read_lines(run_dir.metrics)
    return int(rows[-1]["attempt"]) if rows else 0
