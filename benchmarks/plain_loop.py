"""A configuration's step beside a plain loop of the same arithmetic, on one thread, interleaved.

    python -m benchmarks.plain_loop --shards data/cifar10-train --rounds 5 --seconds 20

The plain loop is what one would write for one process: torch's batch norm and Adam, no averaged
weights, no logging, images in memory, latents drawn as they are needed. Ours is the whole of
training in one process: reader, global batch statistics, DDP, scalers, averages, rows. Prints a
JSON line a round with the images per second of both, then the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ganscale.config import Config, load_config
from ganscale.data.shards import ShardSet
from ganscale.evaluation.image_sets import ImagesOfShards
from ganscale.models import build_discriminator, build_generator
from ganscale.training.benchmark import bench_training
from ganscale.training.inputs import network_input
from ganscale.world import World

NUM_IMAGES = 10_000


def plain_loop(config: Config, images: Tensor, *, seconds: float, num_fakes: int) -> float:
    """Images per second of a plain DCGAN step; `num_fakes` batches of fakes a step, 1 or 2."""
    spec, size = config.generator_spec, config.training.batch_size
    generator, discriminator = build_generator(spec), build_discriminator(spec)
    networks = [n.to(memory_format=torch.channels_last) for n in (generator, discriminator)]
    rates, betas = config.optimizer.lr.at(0), (config.optimizer.beta1, config.optimizer.beta2.at(0))
    adam_g, adam_d = (
        torch.optim.Adam(n.parameters(), lr=rates, betas=betas, fused=True) for n in networks
    )

    def step(real: Tensor) -> None:
        fake = generator(torch.randn(size, config.model.z_dim))
        loss = F.softplus(-discriminator(real)).mean()
        loss = loss + F.softplus(discriminator(fake.detach())).mean()
        adam_d.zero_grad()
        loss.backward()
        adam_d.step()
        if num_fakes == 2:
            fake = generator(torch.randn(size, config.model.z_dim))
        adam_g.zero_grad()
        discriminator.requires_grad_(False)
        F.softplus(-discriminator(fake)).mean().backward()
        discriminator.requires_grad_(True)
        adam_g.step()

    count, began = -5, 0.0  # the first steps warm up
    while count <= 0 or time.perf_counter() - began < seconds:
        if count == 0:
            began = time.perf_counter()
        step(network_input(images[torch.randint(len(images), (size,))]))
        count += 1
    return count * size / (time.perf_counter() - began)


def main() -> None:
    """Measure both in turn and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--config", default="quickstart", help="of a GAN with the classic loss")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--num-fakes", type=int, choices=(1, 2), default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.config, [f"data.shards={arguments.shards}"])
    config = config.with_changes({"launch.num_workers": 1})
    shard_set = ShardSet.load(arguments.shards)
    rows = np.arange(min(NUM_IMAGES, shard_set.num_samples))
    images = ImagesOfShards(shard_set).read(rows)
    rounds = []
    for _ in range(arguments.rounds):
        plain = plain_loop(config, images, seconds=arguments.seconds, num_fakes=arguments.num_fakes)
        ours = bench_training(config, World(), seconds=arguments.seconds)
        rounds.append({"plain": plain, "ganscale": ours.images_per_second})
        parts = {name: round(1000 * value, 2) for name, value in ours.parts.items()}
        print(json.dumps({**rounds[-1], "milliseconds": parts}), flush=True)
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(json.dumps({"medians": medians, "ratio": medians["ganscale"] / medians["plain"]}))


if __name__ == "__main__":
    main()
