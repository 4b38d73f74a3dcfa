"""A network with its optimizer, its loss scaler and its count of skipped steps.

Models know nothing of ranks: distribution is applied here, to finished models, by `distribute`. One
process uses DDP as well, so there is one code path.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from ganscale.config import OptimizerConfig, Schedule
from ganscale.training.batch_statistics import convert_batch_statistics
from ganscale.training.precision import Precision
from ganscale.training.scheduled_adam import ScheduledAdam
from ganscale.training.step_inputs import Rates, StepInputs
from ganscale.world import World

# Buffers are the same on all ranks by construction; a broadcast in each forward would be wasted,
# and two forwards before a backward do not bear it. torch 2.14 renamed the option.
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


class OptimizedModel:
    """A network that learns: forward through `ddp_module`, then `backward`, then `step`.

    The first two are done for each of `micro_batches(inputs)`, the last once for all of them.
    `module` owns the weights; use it where no gradient of this network is wanted. `ddp_module` is
    the same in its DDP wrapper, so that `backward` averages the gradients over ranks.
    """

    module: nn.Module
    ddp_module: DistributedDataParallel

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        precision: Precision,
        world: World,
        *,
        lr: Schedule | None = None,
        clip_weights: float | None = None,
    ) -> None:
        self.module, self.ddp_module = distribute(model, world)
        self.config = config
        self.lr_schedule = lr or config.lr
        self.clip_weights = clip_weights
        # The optimizer reads its rates from tensors that stay where they are, as a captured graph
        # does. The fused kernel reads float32 on CUDA; on the CPU it reads a double, as it does a
        # number.
        on_cuda = world.torch_device.type == "cuda"
        self.lr, self.beta2 = (
            torch.tensor(
                schedule.at(0),
                dtype=torch.float32 if on_cuda else torch.float64,
                device=world.torch_device,
            )
            for schedule in (self.lr_schedule, config.beta2)
        )
        parameters = list(self.module.parameters())
        # Both leave out an update with a gradient that is not finite by a flag on the device.
        self.optimizer: torch.optim.Optimizer
        if config.beta2.is_constant:
            self.optimizer = torch.optim.Adam(
                parameters,
                lr=self.lr,
                betas=(config.beta1, config.beta2.at(0)),
                eps=config.eps,
                fused=True,
                capturable=on_cuda,
            )
        else:
            self.optimizer = ScheduledAdam(
                parameters, self.lr, config.beta1, self.beta2, config.eps
            )
        self.scaler = precision.scaler()
        self.num_skips = torch.zeros((), dtype=torch.int64, device=world.torch_device)

    def micro_batches(self, inputs: StepInputs) -> Iterator[StepInputs]:
        """The inputs in parts, for a forward and a backward of each.

        Gradients add up in the weights. The ranks average them once, in the last part's backward.
        """
        *others, last = inputs.micro_batches
        for part in others:
            # Around the forward too, where DDP decides whether the backward will communicate.
            with self.ddp_module.no_sync():
                yield part
        yield last

    def backward(self, loss: Tensor) -> None:
        """Scaled backward; meanwhile gradients are averaged over the ranks."""
        self.scaler.backward(loss)

    def step(self, rates: Rates) -> Tensor:
        """Update the weights and clear the gradients; returns the unclipped gradients' L2 norm, ().

        With a non-finite gradient the weights stay and the skip is counted. All ranks hold the same
        averaged gradients, so they agree without communication.
        """
        self.lr.copy_(rates.lr)
        self.beta2.copy_(rates.beta2)
        # Gradients are those of the scaled loss up to here; norms and limits below are in true
        # units. Unscaling also notes whether all are finite, which has to come before clipping:
        # that would turn an inf into its limit.
        self.scaler.unscale(self.optimizer)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        # Finite gradients may have an L2 norm that is not, as their squares overflow. So a skip is
        # told by the largest element, which is what the scaler goes by too.
        largest = get_total_norm(gradients, norm_type=torch.inf)
        norm = get_total_norm(gradients)
        # An inf times the factor 0 is NaN, so gradients that are not finite stay so.
        if self.config.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.config.clip_norm / norm).clamp(max=1.0))
        if self.config.clip_value is not None:
            torch._foreach_clamp_min_(gradients, -self.config.clip_value)
            torch._foreach_clamp_max_(gradients, self.config.clip_value)
        # Where a gradient was not finite the fused kernel leaves weights, moments and Adam's step
        # count as they are, by a flag on the device.
        self.scaler.step(self.optimizer)
        # WGAN's constraint (arXiv 1701.07875, algorithm 1) is on the weights after the update.
        if self.clip_weights is not None:
            weights: list[Tensor] = list(self.module.parameters())
            with torch.no_grad():
                torch._foreach_clamp_min_(weights, -self.clip_weights)
                torch._foreach_clamp_max_(weights, self.clip_weights)
        self.optimizer.zero_grad()
        self.num_skips += ~torch.isfinite(largest)
        return norm

    def recover(self) -> None:
        """Forget a forward or backward that was begun and not ended; weights and state stay."""
        self.optimizer.zero_grad()
        # The other ranks may not have to, so without asking them.
        self.ddp_module = wrap_in_ddp(self.module, init_sync=False)
        self.scaler.recover()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, scaler and skip count."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "num_skips": self.num_skips,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state in place."""
        self.module.load_state_dict(state["model"])
        # Rates and options come from this run's configuration, which population-based training may
        # have changed; they stay in the tensors that a captured graph reads, on this run's device.
        (options,) = ({**group} for group in self.optimizer.param_groups)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0].update(options)
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                # Fused Adam walks a weight and its moments in the order of memory, so strides must
                # agree. Weights are channels_last; a checkpoint's tensors come back contiguous.
                like = parameter if value.shape == parameter.shape else parameter.new_empty(())
                moments[name] = torch.empty_like(like, requires_grad=False).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        self.num_skips.copy_(state["num_skips"])


def distribute(model: nn.Module, world: World) -> tuple[nn.Module, DistributedDataParallel]:
    """Move to the device, make batch statistics global and wrap in DDP: (module, wrapper)."""
    module = convert_batch_statistics(model.to(world.torch_device))
    # With channels first, cuDNN's grouped convolutions take 2.4 times as long on an H100.
    module = module.to(memory_format=torch.channels_last)
    return module, wrap_in_ddp(module)


def wrap_in_ddp(module: nn.Module, *, init_sync: bool = True) -> DistributedDataParallel:
    """The wrapper in which a backward averages gradients; with `init_sync` a collective."""
    return DistributedDataParallel(
        module,
        init_sync=init_sync,
        gradient_as_bucket_view=True,
        # Otherwise DDP rearranges its buckets after the first step, and with them the order in
        # which more than two ranks' gradients are summed: a resumed run would round differently.
        find_unused_parameters=True,
        **_NO_BUFFER_SYNC,
    )
