"""How to build and call the training steps of R3GAN and StudioGAN, from folders with their code.

Nothing here is taken from those projects: their configuration is read by their own code, their
networks, losses, optimizers and workers are built by it, and what is written here is which of their
functions a step calls. A process imports one peer only, as their modules have names like `train`,
`config` and `utils`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

RESOLUTION, NUM_CLASSES = 32, 10
NUM_BATCHES = 8
"""Synthetic batches that are used in turn."""
MIN_WARM_UP_STEPS = 5
"""In which kernels are chosen and compiled."""
TINY_BATCH = 4
UNUSED_PACKAGES = ("sklearn", "seaborn", "matplotlib", "kornia", "h5py", "timm", "tensorflow")
"""Imported by StudioGAN for plots, metrics and data sets, none of which is measured."""


@dataclass
class PeerStep:
    """A peer's networks and what trains them."""

    step: Callable[[], int]
    """One update of G with all of D's that go with it; returns the number of D's real images."""
    batch_size: int
    discriminator_steps: int
    precision: str
    networks: tuple[torch.nn.Module, torch.nn.Module]
    """Generator and discriminator."""
    custom_kernels: str
    """compiled or reference."""
    steps_in_a_cycle: int = 1
    """After so many steps everything that is done now and then has been done once."""


@dataclass(frozen=True)
class Peer:
    """A project, and how its step is built: folder, configuration, device, batch size, tiny."""

    url: str
    build: Callable[..., PeerStep]


def measured_step(peer: PeerStep, device: str, *, seconds: float) -> dict[str, Any]:
    """Images a second of a peer's step: whole cycles, for at least `seconds`, after a warm-up."""
    from benchmarks.gpu.measure import device_name

    on_gpu = device != "cpu"
    cycle = peer.steps_in_a_cycle
    for _ in range(cycle * -(-MIN_WARM_UP_STEPS // cycle)):
        peer.step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    num_images, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(cycle):
            num_images += peer.step()
        # The host runs ahead of the GPU; without waiting now and then it would queue steps of
        # minutes, all of which would have to be waited for at the end.
        if on_gpu:
            torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    return {
        "images_per_second": num_images / elapsed,
        "batch_size": peer.batch_size,
        "discriminator_steps": peer.discriminator_steps,
        "precision": peer.precision,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in peer.networks],
        "custom_kernels": peer.custom_kernels,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "device": device_name(device),
        "torch": torch.__version__,
    }


def build_r3gan(
    folder: Path, configuration: str, device: str, *, batch_size: int | None, tiny: bool
) -> PeerStep:
    """R3GAN's networks, loss and optimizers as `train.py --preset configuration` makes them.

    Its training loop needs a data set and a run folder, so the order of its phases (D, then G, each
    on a real batch of its own, then the average) is called here; the gradients are its trainer's.
    """
    sys.path.insert(0, str(folder))
    _stand_in_for_missing_packages()
    kernels = _choose_kernels(device, "torch_utils.ops.bias_act", "torch_utils.ops.upfirdn2d")
    size = batch_size or (TINY_BATCH if tiny else 512)
    options = _r3gan_options(configuration, size)
    if tiny:
        for section in (options.G_kwargs, options.D_kwargs):
            section.WidthPerStage = [32 for _ in section.WidthPerStage]
            section.CardinalityPerStage = [4 for _ in section.CardinalityPerStage]
            section.FP16Stages = []
        options.D_kwargs.ConditionEmbeddingDimension = 32
    dnnlib = importlib.import_module("dnnlib")
    make = dnnlib.util.construct_class_by_name
    # The settings under which its loop trains.
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in ("conv2d_gradfix", "grid_sample_gradfix"):
        importlib.import_module(f"torch_utils.ops.{name}").enabled = True

    shape = {"c_dim": NUM_CLASSES, "img_resolution": RESOLUTION}
    networks = [make(**section, **shape) for section in (options.G_kwargs, options.D_kwargs)]
    generator, discriminator = (n.train().requires_grad_(False).to(device) for n in networks)
    average = copy.deepcopy(generator).eval()
    augment = make(**options.augment_kwargs).train().requires_grad_(False).to(device)
    augment.p.copy_(torch.tensor(options.aug_scheduler["base_value"]))
    loss = make(G=generator, D=discriminator, augment_pipe=augment, **options.loss_kwargs)
    phases = []
    for letter, network in (("D", discriminator), ("G", generator)):
        section = options[f"{letter}_opt_kwargs"]
        # What its schedules begin with. Its own integer 0 is refused by newer versions of torch.
        section.lr = options.lr_scheduler["base_value"]
        section.betas = (0.0, options.beta2_scheduler["base_value"])
        phases.append((letter, network, make(params=network.parameters(), **section)))
    gamma = options.gamma_scheduler["base_value"]
    batches = _in_turn(_synthetic_batches(size, device))
    one_hot = torch.eye(NUM_CLASSES)

    def step() -> int:
        for letter, network, optimizer in phases:
            pixels, labels = next(batches)
            optimizer.zero_grad(set_to_none=True)
            network.requires_grad_(True)
            loss.accumulate_gradients(
                phase=letter,
                real_img=pixels.to(device, non_blocking=True).float() / 127.5 - 1,
                real_c=one_hot[labels].to(device, non_blocking=True),
                gen_z=torch.randn(size, generator.z_dim, device=device),
                gamma=gamma,
                gain=1,
            )
            network.requires_grad_(False)
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), 0.5)
        return size

    precision = "fp32" if tiny else "bf16"
    return PeerStep(step, size, 1, precision, (generator, discriminator), kernels)


def _r3gan_options(configuration: str, batch_size: int) -> Any:
    """What its command line would launch, without launching it."""
    train = importlib.import_module("train")
    dnnlib = importlib.import_module("dnnlib")
    launched: list[Any] = []
    train.launch_training = lambda c, **_: launched.append(c)
    data = dnnlib.EasyDict(use_labels=True, resolution=RESOLUTION, max_size=50_000)
    train.init_dataset_kwargs = lambda **_: (data, "synthetic")
    arguments = ["--outdir", "-", "--data", "-", "--gpus", "1", "--batch", str(batch_size)]
    arguments += ["--preset", configuration, "--cond", "true", "--metrics", "none"]
    train.main.main(args=arguments, standalone_mode=False)
    return launched[0]


def build_studiogan(
    folder: Path, configuration: str, device: str, *, batch_size: int | None, tiny: bool
) -> PeerStep:
    """StudioGAN's worker with `configs/CIFAR10/CONFIGURATION.yaml`, mixed precision on CUDA."""
    source = folder / "src"
    sys.path.insert(0, str(source))
    _stand_in_for_missing_packages()
    kernels = "none"
    if configuration.startswith("StyleGAN"):
        kernels = _choose_kernels(device, "utils.style_ops.bias_act", "utils.style_ops.upfirdn2d")
    config = importlib.import_module("config")
    cfgs = config.Configurations(str(source / "configs" / "CIFAR10" / f"{configuration}.yaml"))
    on_gpu = device != "cpu"
    cfgs.update_cfgs(_studiogan_run(mixed_precision=on_gpu), super="RUN")
    cfgs.OPTIMIZATION.world_size = 1
    if batch_size or tiny:
        cfgs.OPTIMIZATION.batch_size = batch_size or TINY_BATCH
        group = cfgs.STYLEGAN.d_epilogue_mbstd_group_size
        if isinstance(group, int):
            cfgs.STYLEGAN.d_epilogue_mbstd_group_size = min(group, cfgs.OPTIMIZATION.batch_size)
    if tiny and cfgs.MODEL.backbone == "stylegan2":
        cfgs.STYLEGAN.d_reg_interval = 2  # its width is fixed in its code
    elif tiny:
        cfgs.MODEL.g_conv_dim = cfgs.MODEL.d_conv_dim = 8
    cfgs.check_compatability()
    torch.backends.cudnn.benchmark = True
    if cfgs.MODEL.backbone == "stylegan2":
        for name in ("conv2d_gradfix", "grid_sample_gradfix"):
            importlib.import_module(f"utils.style_ops.{name}").enabled = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    worker = _studiogan_worker(cfgs, torch.device(device).index or 0 if on_gpu else device)

    optimization = cfgs.OPTIMIZATION
    num_images = optimization.batch_size * optimization.d_updates_per_step
    numbers = iter(range(sys.maxsize))

    def step() -> int:
        number = next(numbers)
        phases = [worker.train_discriminator, worker.train_generator]
        for phase in phases if optimization.d_first else reversed(phases):
            phase(current_step=number)
        return int(num_images)

    interval = cfgs.STYLEGAN.d_reg_interval
    return PeerStep(
        step,
        optimization.batch_size,
        optimization.d_updates_per_step,
        "fp16" if on_gpu else "fp32",
        (worker.Gen, worker.Dis),
        kernels,
        steps_in_a_cycle=interval if isinstance(interval, int) else 1,
    )


def _studiogan_run(*, mixed_precision: bool) -> dict[str, Any]:
    """What its command line would set: training on one device, nothing measured or drawn."""
    off = (
        "distributed_data_parallel synchronized_bn batch_statistics standing_statistics "
        "langevin_sampling load_train_hdf5 load_data_in_memory save_fake_images vis_fake_images "
        "save_real_images k_nearest_neighbor interpolation frequency_analysis tsne_analysis "
        "intra_class_fid semantic_factorization GAN_train GAN_test empty_cache"
    )
    return {
        **dict.fromkeys(off.split(), False),
        "train": True,
        "mixed_precision": mixed_precision,
        "freezeD": -1,
        "truncation_factor": -1.0,
        "truncation_cutoff": None,
        "eval_metrics": ["none"],
        "ckpt_dir": None,
        "data_dir": "-",
        "save_dir": "-",
        "ref_dataset": "train",
        "print_freq": 100,
        "save_freq": 2000,
        "eval_backbone": "InceptionV3_tf",
        "pre_resizer": "wo_resize",
        "post_resizer": "legacy",
    }


def _studiogan_worker(cfgs: Any, device: int | str) -> Any:
    """Its worker, with networks and optimizers of its own making and synthetic batches."""
    logger = logging.getLogger("studiogan")
    models = importlib.import_module("models.model")
    names = ("Gen", "Gen_mapping", "Gen_synthesis", "Dis", "Gen_ema", "Gen_ema_mapping")
    names = (*names, "Gen_ema_synthesis", "ema")
    built = models.load_generator_discriminator(
        DATA=cfgs.DATA,
        OPTIMIZATION=cfgs.OPTIMIZATION,
        MODEL=cfgs.MODEL,
        STYLEGAN=cfgs.STYLEGAN,
        MODULES=cfgs.MODULES,
        RUN=cfgs.RUN,
        device=device,
        logger=logger,
    )
    networks = dict(zip(names, built, strict=True))
    cfgs.define_optimizer(networks["Gen"], networks["Dis"])
    # A step takes a basket of all its discriminator updates' batches.
    size = cfgs.OPTIMIZATION.batch_size * cfgs.OPTIMIZATION.acml_steps
    basket = size * cfgs.OPTIMIZATION.d_updates_per_step
    on = f"cuda:{device}" if isinstance(device, int) else device
    # Its loader's workers make the floats, so they are ready as well.
    batches = [(pixels.float() / 127.5 - 1, y) for pixels, y in _synthetic_batches(basket, on)]
    if isinstance(device, int):
        batches = [(images.pin_memory(), labels) for images, labels in batches]
    initial_p = cfgs.AUG.ada_initial_augment_p
    worker = importlib.import_module("worker").WORKER(
        cfgs=cfgs,
        run_name="benchmark",
        **networks,
        eval_model=None,
        train_dataloader=batches,
        eval_dataloader=None,
        # Rank 0 would open a run of W&B.
        global_rank=1,
        local_rank=device,
        mu=None,
        sigma=None,
        real_feats=None,
        logger=logger,
        aa_p=initial_p if initial_p != "N/A" else cfgs.AUG.apa_initial_augment_p,
        best_step=0,
        best_fid=None,
        best_ckpt_path=None,
        lecam_emas=None,
        num_eval={},
        loss_list_dict={},
        metric_dict_during_train={},
    )
    worker.training, worker.topk = True, cfgs.OPTIMIZATION.batch_size
    worker.prepare_train_iter(epoch_counter=0)
    return worker


def _synthetic_batches(size: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Random pixels, uint8 (size, 3, 32, 32), and labels (size,); page-locked for a GPU."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(NUM_BATCHES):
        shape = (size, 3, RESOLUTION, RESOLUTION)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        if device != "cpu":
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
        batches.append((pixels, labels))
    return batches


def _in_turn(batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def _choose_kernels(device: str, *modules: str) -> str:
    """Compile the peer's CUDA kernels if that is possible here; else take its reference code."""
    has_compiler = bool(shutil.which("nvcc")) and bool(
        shutil.which("ninja") or importlib.util.find_spec("ninja")
    )
    if device != "cpu" and has_compiler:
        return "compiled"
    for name in modules:
        # Each asks this whether its kernels are there, and takes its own reference code if not.
        importlib.import_module(name)._init = lambda: False
    return "reference"


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that are imported and not used by what is measured."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in UNUSED_PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stand_in_for_missing_packages() -> None:
    # At the end: what is installed is found first.
    sys.meta_path.append(_StandIns())
    if importlib.util.find_spec("pkg_resources") is None:
        # Newer setuptools have dropped it; both peers compare versions with it.
        from packaging.version import parse

        module = types.ModuleType("pkg_resources")
        module.parse_version = parse  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = module


PEERS = {
    "r3gan": Peer("https://github.com/brownvc/R3GAN", build_r3gan),
    "studiogan": Peer("https://github.com/POSTECH-CVLab/PyTorch-StudioGAN", build_studiogan),
}
