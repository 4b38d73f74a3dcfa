"""What presets cost by their shapes alone: parameters, operations and memory of a step.

    python -m benchmarks.preset_costs photos-64 photos-128 photos-256

Prints a table of Markdown. Nothing is computed: the phases of a step of `method.name=gan` are run
on tensors without storage, by the networks, objective and R1 and R2 of the preset, under fp16
autocast. The figures are those of one process and exact for what they count:

    GFLOP     of convolutions and matrix products, for each real image, with lazy penalties at
              their share; two a multiplication with its addition. Augmentation is not counted.
    state     weights, gradients, two Adam moments and the averages, fp32.
    saved     what the largest phase keeps for its backward: activations and half precision copies
              of weights. What kernels need besides, and the allocator's waste, come on top.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ganscale.config import Config, load_config
from ganscale.models import build_discriminator, build_generator
from ganscale.objectives.adversarial import OBJECTIVES
from ganscale.objectives.penalties import input_gradient

WEIGHT_COPIES = 4  # the weight, its gradient and two moments
BYTES_FP32 = 4


@dataclass(frozen=True)
class Costs:
    """Of one preset, in one process."""

    parameters: dict[str, int]
    flop_per_image: float
    state_bytes: int
    saved_bytes: int


class Operations(TorchDispatchMode):
    """Counts two operations for each multiplication and addition of convolutions and products.

    Convolutions are counted here, since torch's formula for the gradient by a weight takes
    no notice of groups; `FlopCounterMode`, moreover, does not bear a gradient within a forward, as
    R1 takes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet == torch.ops.aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            self.flop += _convolution_flop(weight, x if transposed else result)
        elif packet == torch.ops.aten.convolution_backward:
            gradient, x, weight, transposed, mask = *args[:3], args[7], args[10]
            each = _convolution_flop(weight, x if transposed else gradient)
            self.flop += each * (mask[0] + mask[1])
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def _convolution_flop(weight: Tensor, small: Tensor) -> int:
    """A convolution or one of its two adjoints: every element of the weight, in whatever group,
    meets every place of the map on its side of the output channels."""
    return 2 * weight.numel() * len(small) * math.prod(small.shape[2:])


class Saved:
    """Adds up the storages that a phase keeps for its backward, each once; parameters are none."""

    def __init__(self, networks: list[nn.Module]) -> None:
        self.known = {id(p.untyped_storage()) for n in networks for p in n.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.storages[id(storage)] = storage  # kept alive, so that no id comes again
        return tensor

    @property
    def num_bytes(self) -> int:
        """Of all storages."""
        return sum(storage.nbytes() for storage in self.storages.values())


class Step:
    """The phases of a step on tensors without storage."""

    def __init__(self, config: Config) -> None:
        self.config = config
        spec = config.generator_spec
        self.generator = build_generator(spec)
        self.discriminator = build_discriminator(spec)
        self.objective = OBJECTIVES[config.objective.name]
        self.flop = 0
        self.saved: list[int] = []

    @contextmanager
    def counted(self, *, trained: nn.Module) -> Iterator[None]:
        """Count the operations of a phase, and what it saves for its backward."""
        for network in (self.generator, self.discriminator):
            network.requires_grad_(network is trained)
            network.zero_grad(set_to_none=True)
        saved = Saved([self.generator, self.discriminator])
        counter = Operations()
        with counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            yield
        self.flop = counter.flop
        self.saved.append(saved.num_bytes)

    def images(self) -> Tensor:
        """A batch of real images."""
        model, size = self.config.model, self.config.training.batch_size
        return torch.rand(size, model.img_channels, model.resolution, model.resolution)

    def labels(self) -> Tensor | None:
        """Their labels; None for models without classes."""
        num_classes = self.config.generator_spec["num_classes"]
        size = self.config.training.batch_size
        return torch.zeros(size, dtype=torch.int64) if num_classes else None

    def fakes(self) -> Tensor:
        """A batch of the generator."""
        z = torch.randn(self.config.training.batch_size, self.config.model.z_dim)
        images: Tensor = self.generator(z, self.labels())
        return images

    def discriminator_flop(self, *, penalties: bool) -> int:
        """Operations of the discriminator's update, with or without R1 and R2."""
        config = self.config.penalty
        with self.counted(trained=self.discriminator):
            with torch.autocast("cpu", torch.float16):
                with torch.no_grad():
                    fake = self.fakes()
                real, fake = self.images(), fake.detach()
                uses = {
                    "real": penalties and not config.r1.is_zero,
                    "fake": penalties and not config.r2.is_zero,
                }
                real.requires_grad_(uses["real"])
                fake.requires_grad_(uses["fake"])
                logits = self.logits(real), self.logits(fake)
            loss = self.objective.discriminator(*(value.float() for value in logits)).sum()
            for kind, images, value in zip(uses, (real, fake), logits, strict=True):
                if uses[kind]:
                    loss = loss + input_gradient(value, images).square().sum()
            loss.backward()
        return self.flop

    def generator_flop(self) -> int:
        """Operations of the generator's update."""
        with self.counted(trained=self.generator):
            with torch.autocast("cpu", torch.float16):
                fake_logits = self.logits(self.fakes()).float()
                real_logits = fake_logits
                if self.objective.generator_sees_real:
                    real_logits = self.logits(self.images()).float()
            self.objective.generator(real_logits, fake_logits).sum().backward()
        return self.flop

    def logits(self, images: Tensor) -> Tensor:
        """Of the discriminator, (n,)."""
        logits: Tensor = self.discriminator(images, self.labels())
        return logits


def costs(config: Config) -> Costs:
    """What a configuration of method `gan` costs in one process."""
    with FakeTensorMode(), torch.device("cpu"):
        step = Step(config)
        interval, turns = config.penalty.interval, config.training.discriminator_steps
        plain = step.discriminator_flop(penalties=False)
        penalised = step.discriminator_flop(penalties=True)
        update = plain + (penalised - plain) / interval
        flop = update + step.generator_flop() / turns
        sizes = {
            name: sum(p.numel() for p in network.parameters())
            for name, network in (("G", step.generator), ("D", step.discriminator))
        }
        num_averages = 1 + len(config.training.extra_ema_halflives_kimg)
        num_values = WEIGHT_COPIES * sum(sizes.values()) + num_averages * sizes["G"]
        return Costs(
            sizes,
            flop / config.training.batch_size,
            BYTES_FP32 * num_values,
            max(step.saved),
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("presets", nargs="+", help="presets, or .yaml files")
    print("| preset | batch | G / D parameters | GFLOP an image | state | saved |")
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args().presets:
        config = load_config(name)
        found = costs(config)
        sizes = " / ".join(f"{n / 1e6:.2f}" for n in found.parameters.values())
        print(
            f"| `{config.name}` | {config.training.batch_size} | {sizes} M "
            f"| {found.flop_per_image / 1e9:.1f} | {found.state_bytes / 2**20:.0f} MiB "
            f"| {found.saved_bytes / 2**30:.2f} GiB |"
        )


if __name__ == "__main__":
    main()
