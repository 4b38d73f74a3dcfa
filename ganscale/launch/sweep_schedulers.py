"""Ray Tune's schedulers, with what they know kept in the sweep's book, so that a sweep can go on.

Tune forgets its schedulers' state when the process ends. Halving is told again what it was told; a
population begins behind its last round.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from ray.train._internal.session import _FutureTrainingResult
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from ganscale.atomic_files import write_text
from ganscale.checkpoint import CheckpointName, CheckpointStore
from ganscale.checkpoint.files import saved_state
from ganscale.config.search_space import generator_for
from ganscale.config.sweep import Asha, Population, Sweep
from ganscale.errors import CheckpointError
from ganscale.launch.sweep_book import Book, Copy
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import EventLog

__all__ = [
    "Halving",
    "PopulationScheduler",
    "finish_copies",
    "make_copy",
    "scheduler_for",
    "trial_name",
]

METRIC, POSITION = "score", "kimg"
"""What trials call them in their results."""


def scheduler_for(book: Book) -> TrialScheduler:
    """The scheduler of a sweep, as it was when the sweep was interrupted."""
    settings = book.sweep.file.scheduler
    if isinstance(settings, Asha):
        return Halving(book, settings)
    if isinstance(settings, Population):
        return PopulationScheduler(book, settings)
    return FIFOScheduler()


class Halving(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA with rungs that outlive the process; trials are told by name, as Tune's ids do not."""

    def __init__(self, book: Book, settings: Asha) -> None:
        file = book.sweep.file
        super().__init__(
            time_attr=POSITION,
            metric=METRIC,
            mode=file.mode,
            max_t=book.sweep.base.training.total_kimg,
            grace_period=settings.grace_kimg,
            reduction_factor=settings.reduction,
        )
        sign = 1.0 if file.mode == "max" else -1.0
        for name, kimg, score in book.results:
            if score is not None:
                self._brackets[0].on_result(SimpleNamespace(trial_id=name), kimg, sign * score)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Tune has a new trial."""
        super().on_trial_add(controller, _named(trial))

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        """Whether the trial goes on; not where the metric is no number."""
        if math.isnan(result.get(METRIC, 0.0)):
            return TrialScheduler.STOP
        return super().on_trial_result(controller, _named(trial), result)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial has ended."""
        super().on_trial_complete(controller, _named(trial), result)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """A trial goes before it has begun."""
        super().on_trial_remove(controller, _named(trial))


class PopulationScheduler(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training in rounds: all trials stand still while the worse copy the better.

    What differs from Tune's: copies go through our checkpoint stores and are planned in the book
    first; who copies whom and the new values are functions of (seed, position, trial); a trial is
    saved before it is copied whatever the order of the trials (Tune leaves such a copy out); a
    trial that fails does not keep the others waiting (Tune's do, for ever).
    """

    def __init__(self, book: Book, settings: Population) -> None:
        super().__init__(
            time_attr=POSITION,
            metric=METRIC,
            mode=book.sweep.file.mode,
            perturbation_interval=settings.interval_kimg,
            quantile_fraction=settings.quantile,
            custom_explore_fn=lambda config: config,  # Tune asks for some way to explore
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        self._book = book
        self._begun_kimg = book.round_kimg
        self._planned = -1.0
        self._gone: list[Any] = []
        self._next_perturbation_sync = book.round_kimg + settings.interval_kimg

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """A trial begins where the last round left it."""
        super().on_trial_add(controller, trial)
        state = self._trial_state[trial]
        state.last_perturbation_time = state.last_train_time = self._begun_kimg

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial has ended; the others do not wait for it."""
        super().on_trial_complete(controller, trial, result)
        self._go_on_without(controller, trial)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """A trial has failed; the others do not wait for it."""
        super().on_trial_error(controller, trial)
        self._go_on_without(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        """Whether the trial goes on or waits; the last of a round lets it be held."""
        for gone in self._gone:  # Tune waits for them
            self._trial_state[gone].last_train_time = self._next_perturbation_sync
        return super().on_trial_result(controller, trial, result)

    def _go_on_without(self, controller: Any, gone: Any) -> None:
        """Hold the round that only the trial that is gone was missing in."""
        self._gone.append(gone)
        self._trial_state[gone].last_score = None
        sync = self._next_perturbation_sync
        left = [trial for trial in controller.get_live_trials() if trial not in self._gone]
        results = [self._trial_state[trial].last_result for trial in left]
        if left and all(result and result[POSITION] >= sync for result in results):
            self.on_trial_result(controller, left[0], results[0])

    def _save_trial_state(self, state: Any, *args: Any) -> Any:
        """Remember a result; no number is the worst of all, and not left out as Tune does."""
        super()._save_trial_state(state, *args)
        if math.isnan(state.last_score):
            state.last_score = -math.inf
        return state.last_score

    def _checkpoint_or_exploit(
        self, trial: Any, controller: Any, upper: list[Any], lower: list[Any]
    ) -> None:
        """Called for each trial of a round."""
        kimg = self._next_perturbation_sync
        if self._planned != kimg:
            self._planned = kimg
            self._plan(kimg, upper, lower)
        copy = next((c for c in self._book.copies if c.target == trial_name(trial)), None)
        if copy is None:
            super()._checkpoint_or_exploit(trial, controller, upper, [])
            return
        source = next(t for t in upper if trial_name(t) == copy.source)
        super()._checkpoint_or_exploit(source, controller, upper, [])
        saved = self._trial_state[source].last_checkpoint
        if isinstance(saved, _FutureTrainingResult):
            result = saved.resolve()
            self._trial_state[source].last_checkpoint = result.checkpoint
        make_copy(self._book, copy)
        self._exploit(controller, trial, source)

    def _get_new_config(
        self, trial: Any, trial_to_clone: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trial stays what it is, with the values that the book has for it by now."""
        values = self._book.standings[trial_name(trial)].values
        return {**trial.config, "trial": {**trial.config["trial"], "values": dict(values)}}, {}

    def _plan(self, kimg: float, upper: list[Any], lower: list[Any]) -> None:
        """Write down who copies whom, with which values."""
        book, seed = self._book, self._book.sweep.file.seed
        sources = sorted(trial_name(trial) for trial in upper)
        copies = []
        for standing in sorted(
            (book.standings[trial_name(t)] for t in lower), key=lambda s: s.number
        ):
            source = generator_for(seed, "source", float(kimg), standing.number).choice(sources)
            before = book.standings[source].values
            values = book.sweep.explored(before, kimg, standing.number)
            copies.append(Copy(kimg, standing.name, source, values))
        scores = {trial_name(t): s.last_score for t, s in self._trial_state.items()}
        told = {
            name: self._metric_op * score if math.isfinite(score) else None
            for name, score in sorted(scores.items())
            if score is not None
        }
        book.plan(kimg, copies, told)


def finish_copies(book: Book) -> None:
    """Make the copies that were planned when the sweep was interrupted; no trial has run since."""
    for copy in list(book.copies):
        make_copy(book, copy)


def make_copy(book: Book, copy: Copy) -> None:
    """Give a trial the newest verified checkpoint of another, and other values.

    A kill at any moment leaves the copy to be made again, or made. The checkpoint is that of a new
    attempt of the trial, and so fences off whoever may still write to it; the trial's folder gets
    its new configuration and an event that tells of the copy.
    """
    sweep = book.sweep
    target = sweep.config(copy.target, copy.values)
    source = sweep.config(copy.source, book.standings[copy.source].values)
    run_dir = RunDirectory(target.run_dir)
    name = _copy_checkpoint(CheckpointStore(source.checkpoints), sweep, copy)
    write_text(run_dir.config, target.to_yaml())
    log = EventLog(run_dir.events)
    before = book.standings[copy.target].values
    log.write(
        "copy",
        attempt=name.attempt,
        nimg=name.nimg,
        source=copy.source,
        checkpoint=str(name),
        values=copy.values,
        values_before=before,
        values_of_source=book.standings[copy.source].values,
        round_kimg=copy.kimg,
    )
    log.close()
    book.copied(copy, str(name))


def _copy_checkpoint(source: CheckpointStore, sweep: Sweep, copy: Copy) -> CheckpointName:
    """The newest verified checkpoint of `source` as one of the target's, whose history stays."""
    config = sweep.config(copy.target, copy.values)
    run_dir, store = RunDirectory(config.run_dir), CheckpointStore(config.checkpoints)
    files = source.newest()
    if files is None:
        raise CheckpointError(f"{source.location} has no checkpoint that verifies to copy")
    attempt, _ = store.claim(store.newest)
    wandb_run_id = run_dir.wandb_run_id
    meta = {
        **files.meta,
        "config": config.model_dump(mode="json"),
        "wandb_run_id": wandb_run_id.read_text() if wandb_run_id.is_file() else "",
        "copied_from": source.where(files.name),
    }
    state = saved_state(
        files.name.nimg,
        files.state(),
        meta,
        history=run_dir.metrics.read_bytes() if run_dir.metrics.is_file() else b"",
        metrics=source.metrics(files.name),
    )
    return store.write(attempt, state)


def trial_name(trial: Any) -> str:
    """The name of a trial of ours, from Tune's."""
    name: str = trial.config["trial"]["name"]
    return name


def _named(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial_name(trial))
