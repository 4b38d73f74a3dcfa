"""From a configuration and a world to the things the loop works with."""

from __future__ import annotations

import torch

from ganscale.config import Config
from ganscale.data.order import Order
from ganscale.data.reader import ShardReader
from ganscale.data.shards import ShardSet
from ganscale.ema import Ema
from ganscale.errors import ConfigError
from ganscale.generation.latents import seed_for
from ganscale.models import build_discriminator, build_generator
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.state import TrainingState
from ganscale.world import World

__all__ = ["build_reader", "build_state", "check_against_shards"]


def build_state(config: Config, precision: Precision, world: World) -> TrainingState:
    """Fresh players whose weights depend on the seed alone."""
    spec = config.model.model_dump()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "weights"))
        generator, discriminator = build_generator(spec), build_discriminator(spec)
    ema = Ema(generator, halflife_nimg=1000 * config.training.ema_halflife_kimg)
    ema.model.to(world.torch_device)
    return TrainingState(
        Player(generator, config.optimizer, precision, world),
        Player(discriminator, config.optimizer, precision, world),
        ema,
    )


def build_reader(config: Config, shard_set: ShardSet, world: World) -> ShardReader:
    """This rank's reader of the global order."""
    order = Order(
        [shard.num_samples for shard in shard_set.shards],
        num_streams=shard_set.num_streams,
        window=config.data.shuffle_window,
        seed=config.seed,
    )
    return ShardReader(shard_set, order, rank=world.rank, world_size=world.world_size)


def check_against_shards(config: Config, shard_set: ShardSet) -> None:
    """Raise `ConfigError` if the model and the images, or the workers and the streams, disagree."""
    expected = (config.model.img_channels, config.model.resolution, config.model.resolution)
    if shard_set.image_shape != expected:
        channels, height, _ = shard_set.image_shape
        raise ConfigError(
            f"the images in {shard_set.root} have shape {shard_set.image_shape}, the model makes "
            f"{expected}: set model.img_channels={channels} model.resolution={height}"
        )
    if config.launch.num_workers > shard_set.num_streams:
        raise ConfigError(
            f"launch.num_workers={config.launch.num_workers} is more than the "
            f"{shard_set.num_streams} streams of {shard_set.root}: build it with more --num-shards"
        )
