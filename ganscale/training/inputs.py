"""Prepares the inputs of steps ahead of them, in a thread of its own.

Images, labels, random numbers and the values of all schedules are made on the host, packed into one
buffer, and cross to the device in one copy.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ganscale.data.reader import Batch, DeviceRows
from ganscale.data.values import PIXELS, ValueRange
from ganscale.ema import ema_weight
from ganscale.generation.latents import draw_noise, seed_for, uniform
from ganscale.training.step_inputs import (
    LocalBatch,
    StepContext,
    StepInputs,
    StepVariant,
    network_input,
    scalar,
)
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
