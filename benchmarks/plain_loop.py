"""The loop that one would write for a GAN in one process: the yardstick of ganscale's overhead.

    python -m benchmarks.plain_loop quickstart data.shards=data/cifar10-train
    ganscale bench train --config quickstart data.shards=data/cifar10-train

PyTorch's own batch norm and Adam, images kept on the device, latents drawn when they are needed; no
averaged weights, no statistics over ranks, no DistributedDataParallel, no logging. The networks,
the losses, the precision and the kernels are those of the configuration, so the difference in speed
is what ganscale's reader, global statistics, averages and rows cost.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn

from ganscale.config import Config, Schedule, load_config
from ganscale.data.values import PIXELS
from ganscale.evaluation.image_sets import ImagesOfShards
from ganscale.models import build_discriminator, build_generator
from ganscale.objectives.adversarial import OBJECTIVES
from ganscale.training.build import load_shards
from ganscale.training.determinism import use_deterministic_kernels
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import network_input
from ganscale.world import World

_NUM_IMAGES = 10_000
"""Images that are kept on the device; the batches are drawn from these."""
_WARM_UP_STEPS = 5


def main() -> None:
    """Train for some seconds and print the speed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", help="a preset or a .yaml file")
    parser.add_argument("overrides", nargs="*", help="section.field=value ...")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    loop = PlainLoop(load_config(given.config, given.overrides), World.detect(given.device))
    print(f"{loop.images_per_second(given.seconds):,.1f} images/s")


def plain_loop_obstacle(config: Config) -> str:
    """What in the configuration the plain loop does not do; empty if it can train it."""
    objective = OBJECTIVES[config.objective.name]
    obstacles = {
        f"method.name={config.method.name}": config.method.name != "gan",
        f"objective.name={config.objective.name}": objective.generator_sees_real,
        "objective.top_k": config.objective.top_k != Schedule.constant(1.0),
        "penalties": bool(config.penalty.names)
        or bool(config.penalty.orthogonal)
        or config.penalty.gradient_normalisation,
        "augmentation": config.augment.name != "none",
        "clipping": any((config.optimizer.clip_norm, config.optimizer.clip_value))
        or config.optimizer.clip_weights is not None,
        "arrays of floats": load_shards(config).values != PIXELS,
    }
    missing = [name for name, applies in obstacles.items() if applies]
    return f"the plain loop has no {' and no '.join(missing)}" if missing else ""


class PlainLoop:
    """Both networks of a configuration with their optimizers, and the step that updates them.

    Raises `ValueError` for a configuration that `plain_loop_obstacle` objects to.
    """

    def __init__(self, config: Config, world: World) -> None:
        if obstacle := plain_loop_obstacle(config):
            raise ValueError(obstacle)
        self.config, self.device = config, world.torch_device
        if self.device.type == "cpu":
            torch.set_num_threads(config.launch.threads_per_worker)
        # As in training: kernels that sum in one order, and channels last in memory.
        use_deterministic_kernels(self.device)
        self.precision = Precision.resolve(config.training.precision, self.device)
        self.objective = OBJECTIVES[config.objective.name]
        spec = config.generator_spec
        networks = [build_generator(spec), build_discriminator(spec)]
        self.generator, self.discriminator = (
            network.to(self.device).to(memory_format=torch.channels_last) for network in networks
        )
        self.adam_g = self._adam(self.generator, config.optimizer.lr.at(0))
        lr_discriminator = config.optimizer.lr_discriminator or config.optimizer.lr
        self.adam_d = self._adam(self.discriminator, lr_discriminator.at(0))
        # Scalers that are not enabled pass everything on, so that fp32 has the same lines.
        self.scaler_g, self.scaler_d = (
            torch.amp.GradScaler(self.device.type, enabled=self.precision.name == "fp16")
            for _ in range(2)
        )
        images = ImagesOfShards(load_shards(config))
        self.images = images.read(np.arange(min(_NUM_IMAGES, len(images)))).to(self.device)

    def images_per_second(self, seconds: float) -> float:
        """Train for some seconds after a few steps of warm-up; real images that D saw, a second."""
        num_steps, began = -_WARM_UP_STEPS, 0.0
        while num_steps <= 0 or time.perf_counter() - began < seconds:
            if num_steps == 0:
                self._synchronize()
                began = time.perf_counter()
            self.step()
            num_steps += 1
        # The host runs ahead of the GPU: what it has launched counts when it has been computed.
        self._synchronize()
        num_images = num_steps * self.config.training.discriminator_steps * self._batch_size
        return num_images / (time.perf_counter() - began)

    def step(self) -> None:
        """All updates of the discriminator that go with one of the generator, and that one."""
        training = self.config.training
        for turns_left in reversed(range(training.discriminator_steps)):
            # Only the last fakes can be those that the generator learns from.
            shared = training.shared_fakes and turns_left == 0
            real_images, labels = self._real_batch()
            fake_images = self._update_discriminator(real_images, labels, shared=shared)
        if not training.shared_fakes:
            with self.precision.autocast():
                fake_images = self.generator(self._latents(), labels)
        self._update_generator(fake_images, labels)

    def _update_discriminator(
        self, real_images: Tensor, labels: Tensor | None, *, shared: bool
    ) -> Tensor:
        """One update; returns the fakes (B, C, H, W), with the generator's graph if `shared`."""
        with self.precision.autocast():
            with torch.set_grad_enabled(shared):
                fake_images: Tensor = self.generator(self._latents(), labels)
            real_logits = self.discriminator(real_images, labels)
            fake_logits = self.discriminator(fake_images.detach(), labels)
            loss = self.objective.discriminator(real_logits, fake_logits).mean()
        self.adam_d.zero_grad()
        self.scaler_d.scale(loss).backward()
        self.scaler_d.step(self.adam_d)
        self.scaler_d.update()
        return fake_images

    def _update_generator(self, fake_images: Tensor, labels: Tensor | None) -> None:
        self.discriminator.requires_grad_(False)
        with self.precision.autocast():
            fake_logits = self.discriminator(fake_images, labels)
            loss = self.objective.generator(None, fake_logits).mean()
        self.adam_g.zero_grad()
        self.scaler_g.scale(loss).backward()
        self.discriminator.requires_grad_(True)
        self.scaler_g.step(self.adam_g)
        self.scaler_g.update()

    def _adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        optimizer = self.config.optimizer
        betas = (optimizer.beta1, optimizer.beta2.at(0))
        return torch.optim.Adam(
            network.parameters(), lr=lr, betas=betas, eps=optimizer.eps, fused=True
        )

    @property
    def _batch_size(self) -> int:
        return self.config.training.batch_size

    def _latents(self) -> Tensor:
        return torch.randn(self._batch_size, self.config.model.z_dim, device=self.device)

    def _real_batch(self) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) in [-1, 1] and labels (B,) for models that take them."""
        rows = torch.randint(len(self.images), (self._batch_size,), device=self.device)
        num_classes = self.config.generator_spec["num_classes"]
        # Which label an image has does not change how long the step takes, so labels are drawn.
        labels = rows % num_classes if num_classes else None
        return network_input(self.images[rows]), labels

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


if __name__ == "__main__":
    main()
