"""What a configuration would do, before it does it: `--dry-run`.

The memory is what weights and activations take by their shapes; kernels and allocators take more
(`ganscale.training.memory`).
"""

from __future__ import annotations

from ganscale.config import Config
from ganscale.training.build import build_order, check_against_shards, check_generator, load_shards
from ganscale.training.memory import estimate_memory
from ganscale.training.steps import METHODS


def describe_plan(config: Config) -> list[str]:
    """Lines about parameters, memory, steps and shards per worker.

    Raises what training would raise at once: `DataError` if the shards cannot be opened,
    `ConfigError` if they are not for this configuration.
    """
    shard_set = None if config.data.shards is None else load_shards(config)
    if shard_set is not None:
        check_against_shards(config, shard_set)
        check_generator(config, shard_set)
    networks = METHODS[config.method.name].networks(config)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in networks.items()}
    num_streams = None if shard_set is None else shard_set.num_streams
    memory = estimate_memory(config, networks, num_streams)
    activations = ", ".join(f"{name} {_mib(n)}" for name, n in memory.activations.items())
    total = memory.state + max(memory.activations.values())
    batch, workers = config.training.batch_size, config.launch.max_workers
    lines = [
        "parameters: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in sizes.items()),
        f"weights, gradients, optimizers and averages: {_mib(memory.state)} a worker",
        f"activations of {memory.num_images} images in {memory.precision}: {activations}",
        f"more than {_mib(total)} in all: workspaces of kernels and gradients of activations are "
        "not counted",
        f"{config.total_nimg // batch} steps of {batch} images, about {batch / workers:g} a worker",
        f"run folder {config.run_dir}",
    ]
    if shard_set is None:
        return [*lines, f"shards will be built first, from source {config.data.source}"]
    per_worker = len(shard_set.shards) / workers
    epochs = config.total_nimg / shard_set.num_samples
    mixing = build_order(config, shard_set).mixing
    return [
        *lines,
        f"{len(shard_set.shards)} shards, about {per_worker:g} a worker; {epochs:.1f} epochs",
        f"neighbours of a shard end up {mixing:.0%} as far apart as in a shuffle of the whole set",
    ]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
