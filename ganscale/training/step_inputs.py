"""What a step is given: everything that changes from one step to the next, as tensors.

A step reads nothing else, and nothing from the host, so it can be captured as a graph.
`training.inputs` prepares what is here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ganscale.data.values import PIXELS, ValueRange


@dataclass(frozen=True)
class StepContext:
    """Where in the run a step is taken. Its variant and its inputs follow from this, on the host;
    the step itself does not see it."""

    nimg: int = 0
    """The position before the step."""
    step: int = 0
    """Number of steps taken before this one."""
    batch_size: int = 1
    """Size of the global batch."""
    lr_factor: float = 1.0
    """What learning rates are multiplied by."""
    discriminator_steps: int = 1
    """The discriminator's updates for one of the other networks."""

    @property
    def nimg_after(self) -> int:
        """The position after the step, in real images."""
        return self.nimg + self.batch_size

    @property
    def generator_turn(self) -> bool:
        """Whether the other networks learn in this step too."""
        return (self.step + 1) % self.discriminator_steps == 0


@dataclass(frozen=True)
class StepVariant:
    """Which form of the step runs; there are few, and each is one graph."""

    generator_turn: bool = True
    """False where the discriminator alone is updated (discriminator_steps > 1)."""
    penalties: tuple[str, ...] = ()
    """The discriminator's penalties in this step, of `PENALTIES`; lazy ones are left out."""


@dataclass(frozen=True)
class Labelled:
    """Images with labels to learn from, where most images have none; one for each real image."""

    images: Tensor
    """(n, C, H, W) in [-1, 1]"""
    labels: Tensor
    """int64 (n,)"""

    def __getitem__(self, rows: slice) -> Labelled:
        """Some of them."""
        return Labelled(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of one global batch, of any size; or a micro-batch of that part.

    Losses are summed over the samples and multiplied by `loss_weight`, so that the gradient that
    DDP averages over W ranks is that of the mean over the global batch of B.
    """

    real_images: Tensor
    """(n, C, H, W) in [-1, 1]"""
    labels: Tensor | None
    """int64 (n,), of the real images and of the fakes beside them; None without classes."""
    slots: Tensor
    """int64 (n,), the places of these samples in the global batch."""
    global_size: int
    """B, the number of samples in the global batch over all ranks."""
    loss_weight: float
    """W / B for W ranks, which turns a sum over local samples into a part of the global mean."""
    labelled: Labelled | None = None
    """For methods that learn from some labels only."""

    def in_global_batch(self, values: Tensor, *, fill: float) -> Tensor:
        """This rank's values (n,) at their places of the global batch, (B,); `fill` elsewhere."""
        return values.new_full((self.global_size,), fill).index_copy(0, self.slots, values)

    def __getitem__(self, rows: slice) -> LocalBatch:
        """Some of the samples, with the loss weight of all: their losses add up to the batch's."""
        return replace(
            self,
            real_images=self.real_images[rows],
            labels=None if self.labels is None else self.labels[rows],
            slots=self.slots[rows],
            labelled=None if self.labelled is None else self.labelled[rows],
        )


class Rates(NamedTuple):
    """An optimizer's rates in one step, each ()."""

    lr: Tensor
    beta2: Tensor
    """The decay rate of Adam's mean squares."""


@dataclass(frozen=True)
class StepInputs:
    """The arguments of one step; all tensors are on the device."""

    batch: LocalBatch
    noise: Mapping[str, Tensor]
    """Random numbers by purpose, each (n, ...): latents, augmentation rows, noise of penalties."""
    schedules: Mapping[str, Tensor]
    """Values that follow the position, each (): learning rates, penalty weights, ..."""
    micro_batch_size: int | None = None
    """The most samples that go through a network at once; None is all of this rank's."""

    @cached_property
    def micro_batches(self) -> tuple[StepInputs, ...]:
        """These inputs in parts of at most `micro_batch_size` samples, as even as possible.

        A loss is a sum over samples, and no sample's random numbers depend on another, so gradients
        and statistics of the parts add up to those of the whole. There is always one part at least;
        how many there are follows from shapes, and may differ between ranks.
        """
        num_samples = len(self.batch.slots)
        num_parts = max(1, math.ceil(num_samples / (self.micro_batch_size or num_samples or 1)))
        ends = [num_samples * number // num_parts for number in range(num_parts + 1)]
        return tuple(self[start:end] for start, end in itertools.pairwise(ends))

    def __getitem__(self, rows: slice) -> StepInputs:
        """The inputs of some of the samples."""
        return replace(
            self,
            batch=self.batch[rows],
            noise={purpose: numbers[rows] for purpose, numbers in self.noise.items()},
        )

    def rates(self, letter: str) -> Rates:
        """Those of the network with this letter."""
        return Rates(self.schedules[f"lr_{letter}"], self.schedules[f"beta2_{letter}"])


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value of a schedule as an input of the step, ()."""
    return torch.tensor(value, dtype=dtype)


def network_input(pixels: Tensor, values: ValueRange = PIXELS) -> Tensor:
    """Stored (n, C, H, W) to [-1, 1], with the channels last in memory."""
    # The layout of the networks' weights (`distribute`), for which convolutions need no transposes.
    return values.to_network(pixels).contiguous(memory_format=torch.channels_last)
