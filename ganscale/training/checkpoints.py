"""A run's checkpoints as the training loop sees them: begin an attempt, save, go back.

Rank 0 alone talks to the store; the others get a checkpoint's very bytes from it, so they need no
access to it, and a checkpoint is fetched and verified once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist

import ganscale
from ganscale.atomic_files import write_text
from ganscale.checkpoint import (
    Attempt,
    BackgroundWriter,
    CheckpointName,
    CheckpointStore,
    Retention,
    SavedFiles,
    SaveResult,
    Session,
)
from ganscale.checkpoint.encoding import flatten
from ganscale.config import Config
from ganscale.errors import CheckpointError, TrainingFault
from ganscale.json_lines import add_missing_lines
from ganscale.run_directory import RunDirectory
from ganscale.storage import RetryPolicy, StoreError, retry
from ganscale.tracking.wandb_sink import begin_wandb_run
from ganscale.training.collectives import broadcast_bytes
from ganscale.world import World


class CheckpointManager:
    """Checkpoints of one rank's run.

    `attempt` is the current one, on every rank. `session` is the start of the run to which all
    attempts belong; without one the run is not protected from a second start. `start_nimg` is the
    position of the checkpoint that the attempt began with, -1 without one. `best_metric` is the
    name, among the metrics given to `save`, of the one by which the best are kept.
    """

    attempt: Attempt

    def __init__(self, config: Config, world: World, session: Session | None = None) -> None:
        self.config = config
        self.world = world
        self.session = session
        self.run_dir = RunDirectory(config.run_dir)
        self.best_metric: str = config.checkpoint.best_metric
        self.store = (
            CheckpointStore(config.checkpoints, RetryPolicy.of(config.data))
            if world.is_main
            else None
        )
        self._writer: BackgroundWriter | None = None
        self.start_nimg = -1
        # The position of the newest checkpoint that was begun or loaded, which needs no second one.
        self._last_nimg = -1
        self._last_time = time.monotonic()

    def begin(
        self,
        reason: Literal["resume", "rollback"] = "resume",
        up_to: int | None = None,
        accept: Callable[[Any], str | None] = lambda _: None,
    ) -> Any:
        """Begin an attempt; returns the state to go on from, on every rank, or None.

        It is that of the newest checkpoint that verifies, at most at position `up_to`, with which
        `accept` finds nothing wrong. Until the attempt has begun nothing of the run is changed. All
        ranks call this together. Raises `RunInUse`, and `TrainingFault` if a rollback finds no
        checkpoint to go back to.
        """
        # Rank 0 alone claims the attempt and reads; then all get the same bytes and decode them.
        files: SavedFiles | None = None
        header: list[Any] = [None]
        if self.store is not None:
            try:
                files = self._claim(self.store, reason, up_to, accept)
                header = [(self.attempt, None if files is None else files.name)]
            except TrainingFault as fault:
                header = [fault]  # of the run and not of this rank, so all ranks end with it
        # Small things first, as a pickled list; the tensors follow as bytes in pieces.
        dist.broadcast_object_list(header, src=0)
        if isinstance(header[0], TrainingFault):
            raise header[0]
        name: CheckpointName | None
        self.attempt, name = header[0]
        # What the loop does at a position was done before its checkpoint was saved, so the loop
        # does nothing there (`Trainer._train`).
        self.start_nimg = self._last_nimg = -1 if name is None else name.nimg
        if name is None:
            return None
        tree = broadcast_bytes(None if files is None else files.tree)
        tensors = broadcast_bytes(None if files is None else files.tensors)
        return SavedFiles(name, tree, tensors, {}, b"").state()

    def write_config(self) -> None:
        """Make this configuration the one that the run goes on with when it is resumed."""
        config = self.config.to_yaml()
        if self.world.is_main and _text(self.run_dir.config) != config:
            write_text(self.run_dir.config, config)

    def forget_start(self) -> None:
        """Let all be done at the position of the checkpoint that the attempt began with.

        A checkpoint is then saved there too.
        """
        self.start_nimg = self._last_nimg = -1

    def is_due(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint."""
        minutes = (time.monotonic() - self._last_time) / 60
        # Clocks differ between machines; rank 0's decides for all, through `StopConsensus`.
        return self.world.is_main and minutes >= self.config.checkpoint.every_minutes

    def save(
        self,
        nimg: int,
        state: Mapping[str, Any],
        *,
        step: int,
        metrics: Mapping[str, float],
        healthy_nimg: int,
    ) -> None:
        """Save in the background what all ranks have, unless the attempt began with just that.

        The newest checkpoint up to `healthy_nimg` is kept, for a rollback.
        """
        if nimg == self._last_nimg:
            return
        self._last_nimg, self._last_time = nimg, time.monotonic()
        # Ranks other than 0 come this far, to know which position was saved last.
        if self._writer is None:
            return
        meta = {
            "nimg": nimg,
            "step": step,
            "world": asdict(self.world),
            "versions": {"ganscale": ganscale.__version__, "torch": torch.__version__},
            "wandb_run_id": _text(self.run_dir.wandb_run_id),
            "config": self.config.model_dump(mode="json"),
        }
        # The rows travel with the checkpoint, so another machine goes on with the run's whole
        # history.
        history = _text(self.run_dir.metrics).encode()
        self._writer.submit(
            nimg, state, meta, history=history, metrics=dict(metrics), healthy_nimg=healthy_nimg
        )

    def check_current(self) -> None:
        """Raise `Superseded` if another attempt has begun, before files of the run are written."""
        if self.store is not None:
            # A store that cannot be reached for a while ends no run; before it writes a checkpoint,
            # the writer asks again.
            with suppress(OSError, StoreError):
                self.store.check_current(self.attempt)

    @property
    def num_rollbacks(self) -> int:
        """Rollbacks of the run so far."""
        return self.attempt.num_rollbacks

    def results(self) -> list[SaveResult]:
        """What became of checkpoints since the last call."""
        return [] if self._writer is None else self._writer.results()

    def finish(self) -> list[SaveResult]:
        """Wait for the checkpoint in flight."""
        return [] if self._writer is None else self._writer.finish()

    def raise_if_last_write_failed(self, nimg: int) -> None:
        """Raise `CheckpointError` unless the checkpoint at `nimg` has been written."""
        if self._writer is not None and self._last_nimg == nimg and self._writer.last_problem:
            raise CheckpointError(
                f"the last checkpoint, at {nimg / 1000:g} kimg, could not be written to "
                f"{self._writer.store.location}: {self._writer.last_problem}"
            )

    def close(self) -> None:
        """End, without asking a failing store again."""
        if self._writer is not None:
            self._writer.close()

    def where(self, name: CheckpointName) -> str:
        """Path or URL of a checkpoint."""
        assert self.store is not None
        return self.store.where(name)

    def _claim(
        self,
        store: CheckpointStore,
        reason: Literal["resume", "rollback"],
        up_to: int | None,
        accept: Callable[[Any], str | None],
    ) -> SavedFiles | None:
        """On rank 0: begin an attempt; returns the checkpoint that it starts from."""

        def choose() -> SavedFiles | None:
            files = store.newest(up_to=up_to, accept=accept)
            # An attempt that starts from nothing begins the run anew, and prunes what it had.
            if files is None and reason == "rollback":
                limit = "" if up_to is None else f" up to {up_to / 1000:g} kimg"
                raise TrainingFault(
                    f"a rollback finds no checkpoint{limit} in {store.location} that can be "
                    "loaded; `ganscale resume` goes on from the newest one"
                )
            return files

        token, session = secrets.token_hex(8), self.session
        if session is not None and session.copied_from:
            self._leave_wandb_run_of_the_original(session)
        # The token stays the same over all tries, so a claim whose answer was lost is recognised as
        # ours.
        self.attempt, files = retry(
            lambda: store.claim(choose, reason=reason, token=token, session=session),
            RetryPolicy.of(self.config.data),
            f"{store.location} cannot be reached",
        )
        self._begin_writing()
        if files is not None:
            self._restore_history(files)
        return files

    def _begin_writing(self) -> None:
        assert self.store is not None
        checkpoint = self.config.checkpoint
        self._writer = BackgroundWriter(
            self.store,
            self.attempt,
            Retention(
                checkpoint.keep_last,
                checkpoint.keep_best,
                self.best_metric,
                lowest_is_best=checkpoint.best_metric == "fid",
            ),
            RetryPolicy.of(self.config.data),
            max_staleness_seconds=60 * checkpoint.max_staleness_minutes,
        )

    def _leave_wandb_run_of_the_original(self, session: Session) -> None:
        """Give a copied run a W&B run of its own, once, at the first attempt that it begins.

        Before the attempt: from then on the folder no longer counts as a copy.
        """
        assert self.store is not None
        has_begun = self.store.backend.exists(session.holder.beat_file)
        if not has_begun and self.run_dir.wandb_run_id.is_file():
            begin_wandb_run(self.run_dir)

    def _restore_history(self, files: SavedFiles) -> None:
        """On a machine that has not seen the run, or not all of it: its rows and its W&B run."""
        self.run_dir.root.mkdir(parents=True, exist_ok=True)
        add_missing_lines(self.run_dir.metrics, files.history)
        if files.meta["wandb_run_id"] and not self.run_dir.wandb_run_id.is_file():
            self.run_dir.wandb_run_id.write_text(files.meta["wandb_run_id"])


def non_finite(state: Any) -> str | None:
    """What is not finite in a state; None if all of it is."""
    _, tensors = flatten(state)
    for path, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{path} has values that are not finite"
    return None


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
