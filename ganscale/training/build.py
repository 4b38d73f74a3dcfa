"""Builds what the loop works with (state, order, reader) from a configuration and a world.

Initial weights are a function of the seed, the order of samples one of the seed and the shard set.
What does not fit together is refused here, with the option that would have to change.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from ganscale.config import Config, EncoderMethod
from ganscale.data.decoded_cache import (
    DecodedImages,
    DevicePixels,
    Exchange,
    HostPixels,
    choose_cache,
)
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, ImageReader, ReadAhead, ShardImages
from ganscale.data.shard_cache import CachedStore
from ganscale.data.shards import ShardSet
from ganscale.data.values import PIXELS
from ganscale.ema import Ema
from ganscale.errors import ConfigError
from ganscale.generation.latents import seed_for
from ganscale.generation.snapshot import load_generator
from ganscale.storage import ObjectStore, RetryPolicy, Store
from ganscale.training.inputs import ema_halflives
from ganscale.training.precision import Precision
from ganscale.training.state import TrainingState
from ganscale.training.steps import AVERAGED, METHODS
from ganscale.world import World


def build_state(config: Config, precision: Precision, world: World) -> TrainingState:
    """A fresh state whose weights depend on the seed alone, but for those that are loaded."""
    kind = METHODS[config.method.name]
    # The initial weights are a function of the seed alone. The global generator is restored, since
    # this process may be a user's own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "weights"))
        networks = kind.networks(config)
    # Averages copy the networks before they are distributed and moved: a plain module is what
    # samples and snapshots need.
    averaged = nn.ModuleDict({name: networks[name] for name in AVERAGED if name in networks})
    emas = {name: Ema(averaged) for name in ema_halflives(config, 0)}
    for ema in emas.values():
        ema.model.to(world.torch_device)
    method = kind(config, networks, precision, world)
    return TrainingState(method, averaged, emas, world)


def load_shards(config: Config) -> ShardSet:
    """The index of the configured set, from wherever `data.shards` is; `DataError` if damaged."""
    assert config.data.shards is not None, "the launcher builds missing shards"
    return ShardSet.load(config.data.shards, RetryPolicy.of(config.data))


def build_order(config: Config, shard_set: ShardSet) -> Order:
    """The global order of the configured run."""
    return Order(
        [shard.num_samples for shard in shard_set.shards],
        num_streams=shard_set.num_streams,
        window=config.data.shuffle_window,
        seed=config.seed,
    )


def build_reader(
    config: Config, shard_set: ShardSet, world: World, exchange: Exchange
) -> BatchReader:
    """This rank's reader of the global order; all ranks call it at the same time."""
    data = config.data
    store = _local_or_cached(config, shard_set)
    fetches = isinstance(store, CachedStore)
    images: ImageReader = ShardImages(shard_set, store)
    shape = (shard_set.num_samples, *shard_set.image_shape)
    values = shard_set.values
    # Of the whole set, decoded; ranks decide together, as host memory is shared between the ranks
    # of a machine.
    num_bytes = math.prod(shape) * values.numpy_dtype.itemsize
    cache = choose_cache(data.cache, num_bytes, world.torch_device, exchange)
    if cache == "ram":
        kept = HostPixels(shape, rank=world.rank, exchange=exchange, dtype=values.numpy_dtype)
        images = DecodedImages(images, kept)
    elif cache == "device":
        on_device = DevicePixels(shape, world.torch_device, values.torch_dtype)
        images = DecodedImages(images, on_device)
    return BatchReader(
        shard_set,
        build_order(config, shard_set),
        images,
        rank=world.rank,
        world_size=world.world_size,
        on_error=data.on_error,
        ahead=ReadAhead(
            num_threads=data.reader_threads,
            num_batches=data.prefetch_batches,
            # Half a block of the order: time enough to fetch the shards that come next.
            num_samples=shard_set.num_streams * data.shuffle_window // 2 if fetches else 0,
        ),
    )


def _local_or_cached(config: Config, shard_set: ShardSet) -> Store | CachedStore:
    data, store = config.data, shard_set.store
    if data.cache_dir is None or not isinstance(store, ObjectStore):
        return store
    limit = None if data.cache_limit_gb is None else round(1e9 * data.cache_limit_gb)
    return CachedStore(store, shard_set.shards, Path(data.cache_dir), limit)


def check_generator(config: Config, shard_set: ShardSet) -> None:
    """Raise `ConfigError` if an encoder's generator was trained with a different value range."""
    if not isinstance(config.method, EncoderMethod):
        return
    # Reconstructions are compared with the images, so both have to be in the same units.
    values = load_generator(config.method.generator).values
    if values != shard_set.values:
        raise ConfigError(
            f"the generator in {config.method.generator} makes {values}, {shard_set.location} has "
            f"{shard_set.values}: build the set with the same --value-range"
        )


def check_against_shards(config: Config, shard_set: ShardSet) -> None:
    """Raise `ConfigError` if the set is not for the model, the evaluation or so many workers."""
    expected = (config.model.img_channels, config.model.resolution, config.model.resolution)
    if shard_set.image_shape != expected:
        channels, height, _ = shard_set.image_shape
        raise ConfigError(
            f"the images in {shard_set.location} have shape {shard_set.image_shape}, the model "
            f"makes {expected}: set model.img_channels={channels} model.resolution={height}"
        )
    if config.evaluation.every_kimg and shard_set.values != PIXELS:
        raise ConfigError(
            f"evaluation.every_kimg={config.evaluation.every_kimg:g}, but {shard_set.location} "
            "has arrays of floats, and only images have the features that evaluations compare: "
            "set evaluation.every_kimg=0"
        )
    num_classes = len(shard_set.classes)
    if config.model.num_classes not in (0, num_classes):
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but the set in {shard_set.location} "
            f"has {num_classes} classes"
        )
    # A rank reads whole streams of the order; with more ranks than streams some would have none.
    if config.launch.max_workers > shard_set.num_streams:
        raise ConfigError(
            f"launch.num_workers={config.launch.max_workers} is more than the "
            f"{shard_set.num_streams} streams of {shard_set.location}: build it with more "
            "--num-shards and --num-streams"
        )
