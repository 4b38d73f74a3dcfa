"""How much memory a configuration takes, counted without computing anything.

What lasts (weights, gradients, moments, averages) follows from the parameters. Activations are
counted by the step itself: each phase is run on tensors that have shapes and no data, up to its
first backward, where autograd holds all that the backward needs. That takes seconds whatever the
model is, and there is no second description of a step that could be wrong.

Left out are the gradients of activations during a backward, workspaces of kernels (for a small
model cuDNN's may be more than all the rest), what the allocator keeps, and the process itself. So a
worker needs more than the sum.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.training.inputs import ema_halflives
from ganscale.training.precision import LossScaler, Precision
from ganscale.training.step_inputs import (
    Labelled,
    LocalBatch,
    StepContext,
    StepInputs,
    StepVariant,
    scalar,
)
from ganscale.training.steps import AVERAGED, METHODS, TrainingMethod
from ganscale.world import World, process_group


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one worker needs; what is left out is in this module's docstring."""

    state: int
    """Weights, gradients, moments of the optimizers and averages, in fp32."""
    activations: dict[str, int]
    """What is kept for the backward of one micro-batch, by the phases of a step."""
    num_images: int
    """In the largest micro-batch."""
    precision: str
    """Of the activations."""


def estimate_memory(
    config: Config, networks: Mapping[str, nn.Module], num_streams: int | None = None
) -> MemoryEstimate:
    """Count for the worker with most images, of `launch.num_workers`; of [min, max] for the most.

    `networks` are fresh ones of the method, which cannot be used afterwards. `num_streams` are
    those of the shard set; without them the workers share a batch evenly. Steps are taken with all
    penalties, and as they are without `training.compile`.
    """
    device = torch.device("cuda" if config.launch.use_gpu else "cpu")
    precision = Precision.resolve(config.training.precision, device).name
    batch_size, num_workers = config.training.batch_size, config.launch.max_workers
    local_size = largest_local_batch(batch_size, num_streams or num_workers, num_workers)
    num_parts = math.ceil(local_size / (config.training.micro_batch_size or local_size))
    num_images = math.ceil(local_size / num_parts)
    with process_group(World()):
        kind, on_cpu = METHODS[config.method.name], Precision(precision, "cpu")
        method = kind(config, networks, on_cpu, World())
        activations = saved_for_backward(method, num_images)
    averaged = [networks[name] for name in AVERAGED if name in networks]
    return MemoryEstimate(
        state=_state_bytes(method, accumulates=num_parts > 1)
        + len(ema_halflives(config, 0)) * sum(map(_module_bytes, averaged)),
        activations=activations,
        num_images=num_images,
        precision=precision,
    )


def largest_local_batch(batch_size: int, num_streams: int, num_workers: int) -> int:
    """Images of the worker that has most, in any batch that takes from all streams in turn."""
    # Every stream gives `whole` samples and `rest` of them one more, which begin at any stream.
    # Worker r of W reads the streams s with s % W == r (`ganscale.data.order`), so where W does not
    # divide the number of streams, some workers read one more than others.
    whole, rest = divmod(batch_size, num_streams)
    streams = Counter(stream % num_workers for stream in range(num_streams))
    more = [
        Counter((first + n) % num_streams % num_workers for n in range(rest))
        for first in range(num_streams)
    ]
    return max(whole * streams[rank] + extra[rank] for extra in more for rank in streams)


def saved_for_backward(method: TrainingMethod, num_images: int) -> dict[str, int]:
    """Bytes that autograd holds when a backward of so many images begins, by phases.

    `method` is on the CPU, and cannot be trained afterwards.
    """
    # The networks' weights have data, and take part by stand-ins that have none.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_ins = [mode.from_tensor(tensor) for tensor in _tensors(method)]
    weights = {_storage(tensor) for tensor in (*_tensors(method), *stand_ins)}
    holders: weakref.WeakSet[_Holder] = weakref.WeakSet()

    def hold(tensor: Tensor) -> _Holder:
        # Detached, since the output of a node would keep it alive, and the node its output. Leaves
        # have no node, and a weight has to stay itself.
        holders.add(holder := _Holder(tensor if tensor.is_leaf else tensor.detach()))
        return holder

    for model in method.models.values():
        model.scaler = _StopAtBackward()
    activations: dict[str, int] = {}
    with mode:
        inputs, variant = _inputs(method, num_images)
        for phase, update in method.phases(variant):
            try:
                with saved_tensors_hooks(hold, lambda holder: holder.tensor):
                    update(inputs, variant)
            except _BackwardReached:
                # Whatever the graph has let go of is gone here too; views of one storage are one.
                sizes = {_storage(h.tensor): h.tensor.untyped_storage().nbytes() for h in holders}
                activations[phase] = sum(size for key, size in sizes.items() if key not in weights)
    return activations


def out_of_memory_message(config: Config, device: str, total_gib: float | None) -> str:
    """One line for the user whose batch does not fit on a device of so many GiB."""
    size = config.training.micro_batch_size or config.training.batch_size
    room = "" if total_gib is None else f", which has {total_gib:.1f} GiB"
    problem = f"a step of {size} images at once does not fit on {device}{room}"
    # A run that has begun keeps what decides its weights, as micro-batches do not.
    if size == 1:
        return f"{problem}: choose a smaller model, and another name=... if the run has begun"
    half = {"training.micro_batch_size": size // 2}
    try:
        config.with_changes(half)
    except ConfigError as error:
        return (
            f"{problem}: set a smaller training.batch_size, and another name=... if the run has "
            f"begun ({error})"
        )
    return (
        f"{problem}: set training.micro_batch_size={size // 2}, by which gradients change by "
        "rounding alone"
    )


def device_memory_gib(world: World) -> float | None:
    """What the GPU of a rank has; None on a CPU."""
    if world.device == "cpu":
        return None
    return float(torch.cuda.get_device_properties(world.torch_device).total_memory / 2**30)


class _Holder:
    """A tensor that autograd has saved, for as long as it keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _BackwardReached(Exception):
    """Carries the loss, and with it the graph that is looked at."""


class _StopAtBackward(LossScaler):
    """In place of a network's scaler, it ends a phase where its first backward would begin."""

    def __init__(self) -> None:
        super().__init__("cpu", moves=False)

    def backward(self, loss: Tensor) -> None:
        raise _BackwardReached(loss)


def _inputs(method: TrainingMethod, num_images: int) -> tuple[StepInputs, StepVariant]:
    """Those of a step in which all networks learn and all penalties are on."""
    config, model = method.config, method.config.model
    penalties = config.penalty.names if method.discriminator is not None else ()
    variant = StepVariant(generator_turn=True, penalties=penalties)
    images = torch.zeros(num_images, model.img_channels, model.resolution, model.resolution)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(num_images, dtype=torch.int64)
    batch = LocalBatch(
        real_images=images,
        labels=labels if config.generator_spec["num_classes"] else None,
        slots=torch.arange(num_images),
        global_size=num_images,
        loss_weight=1 / num_images,
        labelled=Labelled(images.clone(), labels),
    )
    draws, generator = method.draws(variant), torch.Generator()
    # A penalty that its schedule brings later has no weight yet.
    weights = {f"penalty/{name}": scalar(1.0) for name in penalties}
    inputs = StepInputs(
        batch,
        noise={purpose: draw(num_images, generator) for purpose, draw in draws.items()},
        schedules=weights | method.schedules(StepContext(batch_size=num_images)),
    )
    return inputs, variant


def _state_bytes(method: TrainingMethod, *, accumulates: bool) -> int:
    """Weights, buffers, gradients and moments; `accumulates` says that there are micro-batches."""
    gradients = [
        sum(p.nbytes for p in model.module.parameters() if p.requires_grad)
        for model in method.models.values()
    ]
    num_bytes = sum(tensor.nbytes for tensor in _tensors(method))
    # Gradients lie in DDP's buckets, and there are two moments of Adam. Those of micro-batches are
    # added up beside the buckets, of one network at a time.
    return num_bytes + 3 * sum(gradients) + (max(gradients) if accumulates else 0)


def _module_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _tensors(method: TrainingMethod) -> Iterator[Tensor]:
    for model in method.models.values():
        yield from model.module.parameters()
        yield from model.module.buffers()


def _storage(tensor: Tensor) -> StorageWeakRef:
    """What tensors that share their memory have in common."""
    return StorageWeakRef(tensor.untyped_storage())
