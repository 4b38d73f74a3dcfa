"""What a step is given: everything that changes from one step to the next, as tensors.

Images, labels, random numbers and the values of all schedules are prepared on the host, ahead of
the step and in a thread of their own, packed into one buffer, and cross to the device in one copy.
So a step reads nothing from the host and can be captured as a graph.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ganscale.data.reader import Batch, DeviceRows
from ganscale.data.values import PIXELS, ValueRange
from ganscale.ema import ema_weight
from ganscale.generation.latents import draw_noise, seed_for, uniform
from ganscale.world import World

if TYPE_CHECKING:
    from ganscale.config import Config
    from ganscale.training.labelled import LabelledPool
    from ganscale.training.steps import TrainingMethod

_STEPS_AHEAD = 4
"""More than one, so that a slow batch delays no step as long as the mean keeps up."""
_ALIGNMENT = 16
"""Bytes; a view of a buffer has to begin at a multiple of its type's size."""


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


@dataclass(frozen=True)
class PackedInputs:
    """A step's inputs as one buffer, which crosses to the device in one copy."""

    buffer: Tensor
    """uint8, all tensors one after the other; in page-locked memory if they go to CUDA."""
    layout: Mapping[str, tuple[int, torch.dtype, torch.Size]]
    """Where in the buffer a tensor begins, its type and its shape."""
    table: Tensor | None
    """The whole set on the device, of which the step gathers its images by an index; or None."""

    def to(self, device: torch.device) -> PackedInputs:
        """A copy on the device, which nobody waits for."""
        buffer = torch.empty_like(self.buffer, device=device, pin_memory=False)
        buffer.copy_(self.buffer, non_blocking=True)
        return replace(self, buffer=buffer)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, views of the buffer."""
        tensors = {}
        for name, (start, dtype, shape) in self.layout.items():
            end = start + shape.numel() * dtype.itemsize
            tensors[name] = self.buffer[start:end].view(dtype).view(shape)
        return tensors


@dataclass(frozen=True)
class HostInputs:
    """A step's inputs on the host, and which form of the step takes them."""

    variant: StepVariant
    context: StepContext
    batch: Batch
    packed: PackedInputs

    @property
    def form(self) -> tuple[Hashable, ...]:
        """What a graph is captured for: steps of one form differ in values alone."""
        return (self.variant, *self.packed.layout.items())


class InputPreparer:
    """Prepares the inputs of a method's steps on one rank.

    Args:
        config: of the run.
        world: this rank among the others.
        method: says which noise and which schedules its steps need.
        values: what stored pixels mean.
        num_rollbacks: rollbacks so far; they change the random numbers and the learning rates.
        labelled: images with labels, for methods that learn from some labels only.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        method: TrainingMethod,
        *,
        values: ValueRange = PIXELS,
        num_rollbacks: int = 0,
        labelled: LabelledPool | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.method = method
        self.values = values
        self.labelled = labelled
        # With the same random numbers the run would come to the same place again, so a rollback has
        # others. The order of the images stays, as it belongs to the position.
        seed = config.seed
        self.seed = seed_for(seed, "rollback", num_rollbacks) if num_rollbacks else seed
        self.lr_factor = config.guard.rollback_lr_factor**num_rollbacks

    def ahead(self, batches: Generator[Batch], nimg: int, step: int) -> Generator[HostInputs]:
        """The inputs of the steps from (nimg, step) on, prepared some steps ahead in a thread.

        An error is raised when its step is due, so the steps before it are taken.
        """
        size = self.config.training.batch_size
        numbers = itertools.count()

        def prepare_next() -> HostInputs:
            number = next(numbers)
            return self.prepare(next(batches), nimg + number * size, step + number)

        # One thread: batches come from a generator, which two threads cannot advance at once.
        with closing(batches), ThreadPoolExecutor(1, thread_name_prefix="inputs") as pool:
            waiting = deque(pool.submit(prepare_next) for _ in range(_STEPS_AHEAD))
            try:
                while True:
                    ready = waiting.popleft().result()
                    # Before the yield, so that it is prepared while the step runs.
                    waiting.append(pool.submit(prepare_next))
                    yield ready
            finally:
                for future in waiting:
                    future.cancel()

    def prepare(self, batch: Batch, nimg: int, step: int) -> HostInputs:
        """The inputs of the step at (nimg, step) on `batch`, packed on the host."""
        training = self.config.training
        context = StepContext(
            nimg, step, training.batch_size, self.lr_factor, training.discriminator_steps
        )
        variant = self.method.variant(context)
        draws = dict(self.method.draws(variant))
        # Which labelled images a step takes is random too, and so belongs to the position.
        if self.labelled is not None:
            draws["labelled"] = uniform(1)
        # Drawn for the global batch, of which this rank keeps the rows of its own samples: W
        # workers get the numbers that one would have drawn, at the price of drawing B rows on each.
        noise = draw_noise(
            draws,
            seed=self.seed,
            position=nimg,
            batch_size=training.batch_size,
            slots=batch.slots,
        )
        # Computed here as Python floats; they cross as tensors () with everything else.
        schedules = {**self.method.schedules(context), **self._ema_weights(context)}
        tensors = {"labels": batch.labels, "slots": batch.slots}
        table = None
        if isinstance(batch.stored, DeviceRows):
            tensors["image_index"], table = batch.stored.index, batch.stored.table
        else:
            tensors["images"] = batch.stored
        tensors |= {f"noise/{name}": value for name, value in noise.items()}
        tensors |= {f"schedules/{name}": value for name, value in schedules.items()}
        buffer, layout = _packed(tensors, pin_memory=self.world.torch_device.type == "cuda")
        return HostInputs(variant, context, batch, PackedInputs(buffer, layout, table))

    def unpack(self, packed: PackedInputs) -> StepInputs:
        """The step's arguments, from inputs on the device; part of the step, as it computes."""
        tensors = packed.tensors()
        noise = _with_prefix(tensors, "noise/")
        has_classes = bool(self.config.generator_spec["num_classes"])
        size = self.config.training.batch_size
        if packed.table is None:
            images = tensors["images"]
        else:
            images = packed.table.index_select(0, tensors["image_index"])
        return StepInputs(
            batch=LocalBatch(
                real_images=network_input(images, self.values),
                # Batches always carry labels; a model without classes is not given them.
                labels=tensors["labels"] if has_classes else None,
                slots=tensors["slots"],
                global_size=size,
                loss_weight=self.world.world_size / size,
                labelled=None if self.labelled is None else self.labelled.pick(noise["labelled"]),
            ),
            noise=noise,
            schedules=_with_prefix(tensors, "schedules/"),
            micro_batch_size=self.config.training.micro_batch_size,
        )

    def _ema_weights(self, context: StepContext) -> dict[str, Tensor]:
        if not context.generator_turn:
            return {}
        # Averages move once in so many steps; half-lives count all real images.
        num_images = context.discriminator_steps * context.batch_size
        halflives = ema_halflives(self.config, context.nimg_after)
        return {
            f"ema_weight/{name}": scalar(ema_weight(num_images, halflife))
            for name, halflife in halflives.items()
        }


def ema_halflives(config: Config, nimg: int) -> dict[str, float]:
    """Half-lives in images of the averages, by the names of their snapshots; "" is the main one."""
    training = config.training
    extra = {f"ema-{kimg:g}": 1000 * kimg for kimg in training.extra_ema_halflives_kimg}
    return {"": 1000 * training.ema_halflife_kimg.at(nimg), **extra}


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value of a schedule as an input of the step, ()."""
    return torch.tensor(value, dtype=dtype)


def network_input(pixels: Tensor, values: ValueRange = PIXELS) -> Tensor:
    """Stored (n, C, H, W) to [-1, 1], with the channels last in memory."""
    # The layout of the networks' weights (`distribute`), for which convolutions need no transposes.
    return values.to_network(pixels).contiguous(memory_format=torch.channels_last)


def _packed(
    tensors: Mapping[str, Tensor], *, pin_memory: bool
) -> tuple[Tensor, dict[str, tuple[int, torch.dtype, torch.Size]]]:
    """All tensors in one buffer of bytes, and where each of them lies."""
    layout = {}
    size = 0
    for name, tensor in tensors.items():
        layout[name] = (size, tensor.dtype, tensor.shape)
        size += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
    # A new one each time: that of the step before may still be on its way to the device.
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    for name, (start, dtype, shape) in layout.items():
        part = buffer[start : start + tensors[name].nbytes]
        part.view(dtype).view(shape).copy_(tensors[name])
    return buffer, layout


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
