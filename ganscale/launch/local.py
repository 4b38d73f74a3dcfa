"""Train right here: one process, or one of several that torchrun started."""

from __future__ import annotations

from collections.abc import Sequence

from ganscale.checkpoint import Session
from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.launch.signals import stopping_on_signals
from ganscale.tracking.sinks import Sink
from ganscale.training.callbacks import Callback
from ganscale.training.loop import train
from ganscale.training.stopping import StopRequest, TrainResult
from ganscale.world import World, process_group


def train_in_process(
    config: Config, session: Session | None = None, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Run the training loop in this process, whose start of the run is `session`.

    Raises `ConfigError` if `launch.num_workers` is not the number of processes there are.
    """
    world = World.detect("cuda" if config.launch.use_gpu else "cpu")
    if world.world_size != config.launch.num_workers:
        raise ConfigError(
            f"launch.backend=inprocess runs {world.world_size} worker(s) here, but "
            f"launch.num_workers={config.launch.num_workers}: use launch.backend=ray, or start "
            f"torchrun --nproc-per-node {config.launch.num_workers} -m ganscale train ..."
        )
    stop = StopRequest()
    with stopping_on_signals(stop, config.launch.grace_seconds):
        return train_here(config, world, stop, session=session, callbacks=callbacks)


def train_here(
    config: Config,
    world: World,
    stop: StopRequest,
    sinks: Sequence[Sink] = (),
    session: Session | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Run the training loop in this thread, to its end or until `stop` is set."""
    with process_group(world, timeout_seconds=config.launch.timeout_seconds):
        return train(config, world, stop, sinks, session, callbacks)
