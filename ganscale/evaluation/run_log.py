"""The record of an evaluation in the files of the run that was evaluated."""

from __future__ import annotations

import time
from pathlib import Path

from ganscale.evaluation.distributions.evaluate import Evaluation
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import EventLog, JsonlSink


def log_evaluation(run: Path, samples: ImageSet, evaluation: Evaluation) -> None:
    """Append the metrics to the run's rows of metrics, and the protocol to its events.

    The samples must be of a generator, whose position the row has.
    """
    assert isinstance(samples, GeneratedImages)
    run_dir = RunDirectory(run.expanduser().absolute())
    nimg = int(samples.generator.info["nimg"])
    rows = read_lines(run_dir.metrics)
    # The row must belong to the attempt that the run is in, or `History` would take it for one that
    # a rollback undid.
    attempt = int(rows[-1]["attempt"]) if rows else 0
    sink, events = JsonlSink(run_dir.metrics), EventLog(run_dir.events)
    sink.log({"nimg": nimg, **evaluation.row(), "attempt": attempt, "time/unix": time.time()})
    events.write("evaluation", attempt=attempt, nimg=nimg, **evaluation.to_json())
    sink.close()
    events.close()
