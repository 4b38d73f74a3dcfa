"""What a configuration would do, before it does it: `--dry-run`.

The memory is that of weights, gradients, moments and averages, which follows from the parameters.
Activations depend on kernels and batch, and are not estimated.
"""

from __future__ import annotations

from ganscale.config import Config
from ganscale.training.build import build_order, load_shards
from ganscale.training.steps import AVERAGED, METHODS

__all__ = ["describe_plan"]

# Weights, gradients, two Adam moments; averages come on top.
_STATES_PER_WEIGHT = 4
_BYTES_FP32 = 4


def describe_plan(config: Config) -> list[str]:
    """Lines about parameters, memory, steps and shards per worker."""
    networks = METHODS[config.method.name].networks(config)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in networks.items()}
    num_averages = 1 + len(config.training.extra_ema_halflives_kimg)
    num_averaged = num_averages * sum(sizes.get(name, 0) for name in AVERAGED)
    state_bytes = _BYTES_FP32 * (_STATES_PER_WEIGHT * sum(sizes.values()) + num_averaged)
    batch, workers = config.training.batch_size, config.launch.max_workers
    lines = [
        "parameters: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in sizes.items()),
        f"weights, gradients, optimizers and averages: {state_bytes / 2**20:.0f} MiB a worker",
        f"{config.total_nimg // batch} steps of {batch} images, about {batch / workers:g} a worker",
        f"run folder {config.run_dir}",
    ]
    if config.data.shards is None:
        return [*lines, f"shards will be built first, from source {config.data.source}"]
    shard_set = load_shards(config)
    per_worker = len(shard_set.shards) / workers
    epochs = config.total_nimg / shard_set.num_samples
    mixing = build_order(config, shard_set).mixing
    return [
        *lines,
        f"{len(shard_set.shards)} shards, about {per_worker:g} a worker; {epochs:.1f} epochs",
        f"neighbours of a shard end up {mixing:.0%} as far apart as in a shuffle of the whole set",
    ]
