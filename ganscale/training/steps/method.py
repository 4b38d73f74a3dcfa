"""What a training method is: the networks that learn, and what one step does to them.

The loop knows nothing else of it. So a GAN, a variational autoencoder and what lies between are
fed, averaged, checkpointed, guarded, rolled back and launched by the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.generation.latents import Draw, normal
from ganscale.generation.snapshot import OTHERS
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import StepContext, StepInputs, StepVariant, scalar
from ganscale.training.steps.adversarial_schedules import adversarial_schedules, penalty_weights
from ganscale.training.steps.discriminator import (
    DiscriminatorTrainer,
    Samples,
    orthogonal_loss,
)
from ganscale.training.watchdog import Phase
from ganscale.world import World

AVERAGED = ("generator", *OTHERS)
"""Networks that are averaged and, with that, part of snapshots."""

PhaseUpdate = tuple[Phase, Callable[[StepInputs, StepVariant], dict[str, Tensor]]]
"""A part of a step by the name that the watchdog and the step times know it by, and its update."""


class TrainingMethod(ABC):
    """A way to train a generator: `step(inputs, variant)` is a function of tensors.

    Inside a step no value is read from the device, no tensor is made of values of the host, and
    nothing is drawn. What changes from step to step is in the inputs; what lasts is state that
    `state_dict` returns.
    """

    models: Mapping[str, OptimizedModel]
    """The networks that learn, by the letter of their statistics and in checkpoints."""
    statistics: tuple[str, ...]
    """Names of all that `step` may return."""
    discriminator: DiscriminatorTrainer | None = None
    """Its discriminator, for methods that have one; it is one of the models, with the letter D."""

    def __init__(self, config: Config, precision: Precision) -> None:
        self.config = config
        self.precision = precision

    @staticmethod
    @abstractmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        """Fresh networks by name, on the CPU; torch's global generator decides their weights.

        Raises `ConfigError` if one that is to be loaded does not fit the configuration.
        """

    @abstractmethod
    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        """The random numbers that a step needs, by purpose."""

    def latent_draws(self, variant: StepVariant, *purposes: str) -> dict[str, Draw]:
        """Draws N(0, 1), (B, z_dim), for each purpose in each phase: "D z", "G z"."""
        phases = ("D", "G") if variant.generator_turn else ("D",)
        draw = normal(self.config.model.z_dim)
        return {f"{phase} {purpose}": draw for phase in phases for purpose in purposes}

    @abstractmethod
    def phases(self, variant: StepVariant) -> Sequence[PhaseUpdate]:
        """The updates that make a step, in their order."""

    def step(
        self,
        inputs: StepInputs,
        variant: StepVariant,
        enter: Callable[[Phase], None] = lambda phase: None,
    ) -> dict[str, Tensor]:
        """Update all networks on a part of a global batch.

        Returns statistics, each (): averaged over ranks they are those of the global batch. `enter`
        is called before each phase, for the watchdog and the step times.
        """
        statistics: dict[str, Tensor] = {}
        for name, update in self.phases(variant):
            enter(name)
            # In their order: a later phase is judged by the discriminator that has just learnt.
            statistics |= update(inputs, variant)
        return statistics

    def variant(self, context: StepContext) -> StepVariant:
        """Which form of the step is taken at a position."""
        penalties: tuple[str, ...] = ()
        if self.discriminator is not None:
            # Only the names: which penalties are in a step is a form of its graph, how strong they
            # are is an input to it (`adversarial_schedules`).
            weights = penalty_weights(self.config, nimg=context.nimg, step=context.step)
            penalties = tuple(weights)
        return StepVariant(context.generator_turn, penalties)

    def schedules(self, context: StepContext) -> dict[str, Tensor]:
        """The values of all schedules in a step, on the host, each ()."""
        values: dict[str, Tensor] = {}
        for letter, model in self.models.items():
            nimg = self._nimg_of_update(letter, context)
            lr = model.lr_schedule.at(nimg) * context.lr_factor
            # float64, since fused Adam on the CPU reads a double: the bits are then those of a
            # learning rate that is a plain number.
            values[f"lr_{letter}"] = scalar(lr, torch.float64)
            values[f"beta2_{letter}"] = scalar(model.config.beta2.at(nimg), torch.float64)
        if self.discriminator is not None:
            values |= adversarial_schedules(self.config, context)
        return values

    def recover(self) -> None:
        """Forget a step that was begun and not ended; what it learned up to there stays."""
        for model in self.models.values():
            model.recover()

    def extra_metrics(self, nimg: int) -> dict[str, float]:
        """What a row of metrics has besides the statistics, the same on all ranks."""
        return {} if self.discriminator is None else self.discriminator.extra_metrics(nimg)

    def state_dict(self) -> dict[str, Any]:
        """What changes besides the models."""
        return {} if self.discriminator is None else self.discriminator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state in place."""
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state)

    def _nimg_of_update(self, letter: str, context: StepContext) -> int:
        """The position at which a network's schedules are read: after this batch for networks that
        are updated after the discriminator, before it for all others."""
        follows = self.discriminator is not None and letter != "D"
        return context.nimg_after if follows else context.nimg


class AdversarialMethod(TrainingMethod):
    """A method with two networks that learn in turn: a generator and a discriminator of its fakes.

    A subclass says in `networks` what they are, in `make_samples` what the discriminator compares,
    and in `update_generator` what the generator minimises.
    """

    discriminator: DiscriminatorTrainer
    letter = "G"
    """That of the generator's statistics and rates, and its key in checkpoints."""
    generator_phase: Phase = "generator"
    generator_statistics: tuple[str, ...] = ("loss_G", "grad_norm_G")

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        super().__init__(config, precision)
        module = self.generator_module(networks)
        self.generator = OptimizedModel(module, config.optimizer, precision, world)
        network = networks["classifier" if "classifier" in networks else "discriminator"]
        self.discriminator = DiscriminatorTrainer(config, network, precision, world)
        self.models = {self.letter: self.generator, "D": self.discriminator.model}
        self.statistics = (*self.discriminator.statistics, *self.generator_statistics)

    def generator_module(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        """What learns besides the discriminator: the generator, alone or with an encoder.

        One module with one forward: DDP takes the parameters that its latest forward did not reach
        for unused, which would be the encoder's if the two were called one after the other.
        """
        return networks["generator"]

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        phases: list[PhaseUpdate] = [("discriminator", self.update_discriminator)]
        if variant.generator_turn:
            phases.append((self.generator_phase, self.update_generator))
        return phases

    @abstractmethod
    def make_samples(self, inputs: StepInputs, variant: StepVariant) -> tuple[Samples, Samples]:
        """Real samples of the discriminator's phase and as many fakes; called without gradients."""

    def update_discriminator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the discriminator; the generator's comes after it."""
        return self.discriminator.update(
            inputs, variant, lambda part: self.make_samples(part, variant)
        )

    @abstractmethod
    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the generator against the updated discriminator."""

    def minimise(self, inputs: StepInputs, loss: Tensor) -> dict[str, Tensor]:
        """Update the generator on a loss, (), and the penalty on its weights; its statistics."""
        weights = self.generator.module
        self.generator.backward(loss + orthogonal_loss(weights, self.config.penalty.orthogonal))
        grad_norm = self.generator.step(inputs.rates(self.letter))
        return {f"loss_{self.letter}": loss.detach(), f"grad_norm_{self.letter}": grad_norm}


class MethodClass(Protocol):
    """The constructor of a method, as the table of methods has it."""

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        """As `TrainingMethod.networks`."""
        ...

    def __call__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> TrainingMethod:
        """The method with these networks, which it moves to the device."""
        ...
