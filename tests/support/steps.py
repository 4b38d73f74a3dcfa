"""Inputs for single steps, and the gradients that updates are made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ganscale.generation.latents import draw_noise
from ganscale.training.inputs import HostInputs
from ganscale.training.loop import Trainer
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.step_inputs import Labelled, LocalBatch, StepContext, StepInputs, StepVariant
from ganscale.training.steps import TrainingMethod


def local_batch(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    global_size: int | None = None,
    world_size: int = 1,
    labelled: Labelled | None = None,
) -> LocalBatch:
    """These images as a rank's part of a global batch; without `slots` as all of it."""
    if slots is None:
        slots = torch.arange(len(images))
    size = global_size or len(images)
    return LocalBatch(images, labels, slots.to(images.device), size, world_size / size, labelled)


def step_inputs(
    method: TrainingMethod,
    batch: LocalBatch,
    *,
    seed: int = 0,
    nimg: int = 0,
    step: int = 0,
    discriminator_steps: int = 1,
) -> tuple[StepInputs, StepVariant]:
    """What the method's step takes at this position."""
    context = StepContext(nimg, step, batch.global_size, discriminator_steps=discriminator_steps)
    variant = method.variant(context)
    noise = draw_noise(
        method.draws(variant),
        seed=seed,
        position=nimg,
        batch_size=batch.global_size,
        slots=batch.slots.cpu(),
    )
    device = batch.real_images.device
    inputs = StepInputs(
        batch=batch,
        noise={name: value.to(device) for name, value in noise.items()},
        schedules={name: v.to(device) for name, v in method.schedules(context).items()},
        micro_batch_size=method.config.training.micro_batch_size,
    )
    return inputs, variant


def next_inputs(trainer: Trainer) -> HostInputs:
    """What the trainer's next step takes."""
    state = trainer.state
    batch = trainer.reader.read(state.nimg, trainer.config.training.batch_size)
    return trainer.inputs.prepare(batch, state.nimg, state.step)


@contextmanager
def recorded_gradients(model: OptimizedModel) -> Iterator[list[Tensor]]:
    """The gradients of the model's parameters in each update of the block, as Adam gets them."""
    gradients: list[Tensor] = []

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.extend(p.grad.clone() for p in parameters if p.grad is not None)

    handle = model.optimizer.register_step_pre_hook(record)
    try:
        yield gradients
    finally:
        handle.remove()
