"""What a run shows of itself: rows, events, sample grids, snapshots. Only rank 0 writes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ganscale.checkpoint import Attempt
from ganscale.config import Config
from ganscale.data.values import PIXELS, ValueRange
from ganscale.generation.pictures import as_pictures, save_grid
from ganscale.generation.sampler import SampleableGenerator, diversity
from ganscale.generation.snapshot import OTHERS, save_snapshot
from ganscale.json_lines import read_lines
from ganscale.provenance import provenance
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from ganscale.tracking.logs import log_event, log_row
from ganscale.tracking.sinks import EventLog, JsonlSink, NullSink, Sink, Sinks
from ganscale.tracking.wandb_sink import WandbSink, resolve_mode
from ganscale.training.state import TrainingState
from ganscale.world import World


class Outputs:
    """The files of a run, its W&B run and other `sinks`; ranks other than 0 write nothing.

    Rows and events carry the number of the attempt that wrote them.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        sinks: Sequence[Sink] = (),
        values: ValueRange = PIXELS,
        classes: Sequence[str] = (),
        class_counts: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.values = values
        self.classes = classes
        self.class_counts = class_counts
        self.world = world
        self._extra_sinks = sinks
        self._step = 0
        self.run_dir = RunDirectory(config.run_dir)
        self.attempt = 0
        self._sink: Sink = NullSink()
        self._events: EventLog | None = None
        self._lock = threading.Lock()

    def open(
        self,
        attempt: Attempt,
        state: TrainingState,
        precision: str,
        *,
        num_rollbacks: int,
        copied_from: str = "",
    ) -> None:
        """Begin to write, after what earlier attempts wrote.

        `copied_from` is the folder that this run's folder is a copy of.
        """
        self.attempt = attempt.number
        if not self.world.is_main:
            return
        mode = resolve_mode(self.config.tracking.wandb)
        # A rollback begins a new attempt in the same process, with the files still open.
        if self._events is None:
            self._open_sinks(mode)
        self.event(
            attempt.reason,
            nimg=state.nimg,
            step=state.step,
            checkpoint=None if attempt.start is None else str(attempt.start),
            num_rollbacks=num_rollbacks,
            world_size=self.world.world_size,
            pid=os.getpid(),
            precision=precision,
            device=self.world.device,
            wandb=mode,
            **provenance(self.world.device),
            **({"copied_from": copied_from} if copied_from else {}),
        )

    def close(self) -> None:
        """Close files and W&B."""
        # Before the events: W&B's process may have something to tell while it ends.
        self._sink.close()
        with self._lock:
            if self._events is not None:
                self._events.close()
                self._events = None

    def row(self, values: Mapping[str, float]) -> None:
        """Log a row of metrics; it has `step` and `nimg`."""
        self._step = int(values["step"])
        if self.world.is_main:
            log_row(values, self.config.name, self.world.rank)
        self._sink.log({**values, "attempt": self.attempt, "time/unix": time.time()})

    def event(self, event: str, **fields: Any) -> None:
        """Note that something happened; may be called from any thread."""
        log_event({"step": self._step, **fields, "event": event}, self.config.name, self.world.rank)
        # The watchdog and W&B report from threads of their own.
        with self._lock:
            if self._events is not None:
                self._sink.event(self._events.write(event, attempt=self.attempt, **fields))

    def draw_samples(self, state: TrainingState) -> float | None:
        """Draw the grid; returns the diversity of its images, if there are two."""
        spec = self.config.generator_spec
        generator = SampleableGenerator(state.generator, spec=spec, info={}, values=self.values)
        path = self.run_dir.sample_grid(state.nimg)
        # The same latents each time: a grid shows what became of an image, and diversity compares
        # like with like.
        images = generator.sample(self.config.samples.num_images, seed=0)
        save_grid(as_pictures(images, self.values), path)
        self._sink.log_picture("samples", path, nimg=state.nimg, step=state.step)
        return diversity(images, self.values) if len(images) > 1 else None

    def save_snapshots(self, state: TrainingState) -> None:
        """Write the networks of each average."""
        for average in state.emas:
            self._save_snapshot(state, average, self.run_dir.snapshot(state.nimg, average))

    def save_best(self, state: TrainingState) -> None:
        """Write the averaged networks in place of the best ones so far."""
        if not self.world.is_main:
            return
        path = self.run_dir.snapshot(state.nimg, "best")
        self._save_snapshot(state, "", path)
        # Only now that the new one is whole: a crash in between leaves two, never none.
        for other in path.parent.glob("*.safetensors"):
            if other != path:
                other.unlink()

    def _save_snapshot(self, state: TrainingState, average: str, path: Path) -> None:
        networks = state.networks(average)
        others = {name: networks[name] for name in OTHERS if name in networks}
        spec = self.config.generator_spec
        save_snapshot(
            path,
            networks["generator"],
            spec=spec,
            nimg=state.nimg,
            classes=self.classes,
            class_counts=self.class_counts,
            others=others,
            values=self.values,
        )

    def _open_sinks(self, wandb_mode: str) -> None:
        tracking = self.config.tracking
        self.run_dir.root.mkdir(parents=True, exist_ok=True)
        # Read before anything is appended. W&B counts faults and shows tables of the whole run, of
        # which this process has seen nothing yet.
        history = History.read(self.run_dir)
        self._events = EventLog(self.run_dir.events)
        sinks: list[Sink] = [JsonlSink(self.run_dir.metrics), *self._extra_sinks]
        if wandb_mode != "disabled":
            sinks.append(
                WandbSink(
                    self.run_dir,
                    project=tracking.project,
                    mode=wandb_mode,
                    config=self.config.model_dump(),
                    report=lambda message: self.event("wandb", message=message),
                )
            )
        self._sink = Sinks(*sinks)
        self._sink.begin(history.rows, read_lines(self.run_dir.events))
