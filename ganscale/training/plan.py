"""What a configuration would do, before it does it."""

from __future__ import annotations

from torch import nn

from ganscale.config import Config
from ganscale.models import build_discriminator, build_generator
from ganscale.training.build import build_order, load_shards

__all__ = ["describe_plan"]

# Weights, gradients, two Adam moments; the generator's averages come on top.
_STATES_PER_WEIGHT = 4
_BYTES_FP32 = 4


def describe_plan(config: Config) -> list[str]:
    """Lines about parameters, memory, steps and shards per worker."""
    spec = config.model.model_dump()
    num_g, num_d = _count(build_generator(spec)), _count(build_discriminator(spec))
    num_averages = 1 + len(config.training.extra_ema_halflives_kimg)
    state_bytes = _BYTES_FP32 * (_STATES_PER_WEIGHT * (num_g + num_d) + num_averages * num_g)
    batch, workers = config.training.batch_size, config.launch.max_workers
    lines = [
        f"generator {num_g / 1e6:.2f} M parameters, discriminator {num_d / 1e6:.2f} M",
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


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
