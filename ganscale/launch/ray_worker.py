"""A Ray Train worker: the training loop, and what it tells Ray and hears from it.

Rows of metrics reach Ray through `ray.train.report`, and a notice that a node will be taken away
comes from `ray.train.get_preemption_info`. Both wait for all workers of the group, so a thread
calls them, in the same order on every rank, and training waits for neither.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.util import get_current_placement_group
from rich.console import Console

from ganscale.config import Config, load_config
from ganscale.errors import GanscaleError, base_class
from ganscale.launch.driver_actor import Messages, copied_to_driver
from ganscale.tracking.logs import to_stderr
from ganscale.tracking.sinks import NullSink, Row
from ganscale.world import World

# Ray's controller imports this module as well, and waits for what it imports: what trains is
# imported by the functions that train.
if TYPE_CHECKING:
    from ganscale.checkpoint import Session
    from ganscale.training.stopping import StopRequest, TrainResult

_STOP_SECONDS = 0.3
"""Between two looks for a message to stop."""
_REPORT_SECONDS = 2.0
"""Between two reports: Ray takes in no more than one each time it looks after its workers."""
_LAST_REPORT_SECONDS = 20.0


def train_loop_per_worker(settings: Mapping[str, Any]) -> TrainResult:
    """Train a run in the workers of a `ray.train.torch.TorchTrainer` of your own.

    `settings` is the trainer's `train_loop_config`: `config` is a preset's name, the path of a YAML
    file that all nodes have, or a `Config`; all other keys are fields to change. The workers are
    the trainer's, so `launch.num_workers`, `launch.use_gpu` and `launch.backend` follow from it.

    Example:
        >>> import ganscale.ray
        >>> from ray.train import FailureConfig, RunConfig, ScalingConfig
        >>> from ray.train.torch import TorchTrainer
        >>>
        >>> trainer = TorchTrainer(
        ...     ganscale.ray.train_loop_per_worker,
        ...     train_loop_config={"config": "dcgan-cifar10", "name": "mine"},
        ...     scaling_config=ScalingConfig(num_workers=2),
        ...     run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
        ... )
        >>> result = trainer.fit()

    `result.metrics` is the last row, `result.return_value` says where training ended, and
    `result.checkpoint` holds `ganscale.json`, which says where the run and its checkpoint are. A
    worker group that Ray starts again goes on from the newest checkpoint. The run's folder has to
    be on storage that all nodes share, or `checkpoint.location` a URL. Shards are built first where
    `data.shards` is not set. Raises what `ganscale.train` raises.
    """
    from ganscale.launch.held_run import run_session
    from ganscale.launch.resolve_run import resolve_config
    from ganscale.training.stopping import StopRequest

    changes = {name: value for name, value in settings.items() if name != "config"}
    chosen = settings["config"]
    config = chosen if isinstance(chosen, Config) else load_config(chosen)
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    world = World.detect(device)
    workers = {
        "launch.backend": "inprocess",
        "launch.num_workers": world.world_size,
        "launch.use_gpu": device == "cuda",
    }
    console = Console(stderr=True, markup=False, emoji=False, quiet=not world.is_main)
    config = resolve_config(config.with_changes({**changes, **workers}), console)
    to_stderr(config.name, world.rank)
    # Ray has ended the workers of an earlier attempt, but their hold may seem to last.
    with run_session(config, console, take_over=True) as held:
        session = None if held is None else held.session
        return _train(config, world, StopRequest(), session)


def train_worker(settings: Mapping[str, Any]) -> TrainResult | None:
    """One worker of a group that `launch.ray_train` has started.

    Returns where training ended; None if an earlier group ended with an error of the run itself.
    """
    from ganscale.checkpoint import Superseded
    from ganscale.training.stopping import StopRequest

    messages: Messages = settings["messages"]
    os.environ.update(ray.get(messages.actor.secrets.remote()))
    if messages.get("error"):
        return None  # Ray starts workers again after any error; this one would only come again
    config = Config.model_validate(settings["config"])
    world = World.detect("cuda" if config.launch.use_gpu else "cpu")
    os.environ.update(settings["wandb"])
    to_stderr(config.name, world.rank)
    if world.is_main:
        messages.put("places", get_current_placement_group())
    stop, done = StopRequest(), threading.Event()
    listener = threading.Thread(
        target=_listen, args=(messages, stop, done), name="stop", daemon=True
    )
    if world.is_main:
        listener.start()
    try:
        with copied_to_driver(messages, config.run_dir, world):
            return _train(config, world, stop, settings["session"])
    except Superseded:
        raise  # by the group that has taken over
    except GanscaleError as error:
        messages.put("error", (base_class(error), f"rank {world.rank}: {error}"))
        raise
    finally:
        done.set()


def _train(config: Config, world: World, stop: StopRequest, session: Session | None) -> TrainResult:
    from ganscale.launch.ray_metrics import RayMetrics
    from ganscale.training.loop import train

    rows = _Rows()
    sinks = [RayMetrics(config.name, config.total_nimg), rows] if world.is_main else []
    with _reporting(config, rows, stop):
        return train(config, world, stop, sinks, session)


def _listen(messages: Messages, stop: StopRequest, done: threading.Event) -> None:
    """Take up the driver's request to stop, which is rank 0's to hear."""
    while not done.wait(_STOP_SECONDS):
        with suppress(RayError):  # the driver's host may be out of reach for a while
            if reason := messages.get("stop"):
                stop.reason = reason


class _Rows(NullSink):
    """The newest row, on rank 0."""

    def __init__(self) -> None:
        self.newest: Row = {}
        self.is_new = False

    def log(self, row: Row) -> None:
        self.newest, self.is_new = row, True


@contextmanager
def _reporting(config: Config, rows: _Rows, stop: StopRequest) -> Iterator[None]:
    """Report to Ray while the block runs, and ask to stop before a node is taken away.

    After a block that has ended well the last row is reported once more, with a checkpoint of Ray's
    that names ours: a `Result` of Ray Train shows the metrics of its newest checkpoint only.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_report, args=(config, rows, stop, ended), name="ray-report", daemon=True
    )
    thread.start()
    yield
    # Not after an error: then other ranks may never come to the last report.
    ended.set()
    thread.join(_LAST_REPORT_SECONDS)


def _report(config: Config, rows: _Rows, stop: StopRequest, ended: threading.Event) -> None:
    with suppress(RayError):  # the group is being torn down
        while True:
            is_over = ended.wait(_REPORT_SECONDS)
            # Rank 0 has the rows, and all have to report at the same time.
            is_new, is_over = broadcast_from_rank_zero((rows.is_new, is_over))
            if is_new:
                rows.is_new = False  # before the row is read: one that comes meanwhile is new again
            if is_over and rows.newest:
                with _pointer(config) as pointer:
                    ray.train.report(dict(rows.newest), pointer)
            elif is_over or is_new:
                ray.train.report(dict(rows.newest))
            if is_over:
                return
            if ray.train.get_preemption_info() is not None and not stop.reason:
                stop.reason = "regroup"


@contextmanager
def _pointer(config: Config) -> Iterator[ray.train.Checkpoint]:
    """A checkpoint of Ray's that says where ours is."""
    from ganscale.checkpoint import CheckpointStore

    newest = None
    # A store that is out of reach must not keep the report back, for which all ranks wait.
    with suppress(GanscaleError, OSError):
        store = CheckpointStore(config.checkpoints)
        newest = next((store.where(name) for name in store.lineage()), None)
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({"run": str(config.run_dir), "checkpoint": newest})
        Path(folder, "ganscale.json").write_text(text)
        yield ray.train.Checkpoint.from_directory(folder)
