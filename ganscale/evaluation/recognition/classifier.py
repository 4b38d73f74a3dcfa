"""A small image classifier trained by a fixed recipe, on which the classifier-based scores rest.

A residual network with the activation before the convolution (He et al. 2016, arXiv 1603.05027) for
images of any shape from 8x8. Its batch norm uses running statistics when it predicts, so a
prediction never depends on the images beside it; with statistics of a test batch, fake images would
betray each other. (Group norm, which has none, reached 41 % where batch norm reached 61 % in equal
training.)

The recipe is SGD with Nesterov momentum, a linear warm-up and a cosine to 0, for a fixed number of
images passed, so that sets of different sizes get equal training. On the CPU, with the same number
of threads, the same seed gives the same network bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImageSet

Labels = NDArray[np.int64]
Progress = Callable[[int], object]
"""Called with the number of images trained on since the last call; `num_passes` in all."""

_SMALLEST = 8
_FULL_WIDTH_RESOLUTION = 32
_READ_IMAGES = 1024
_MOMENTUM = 0.9
_WARM_UP = 0.1
"""Part of the training in which the learning rate rises from 0."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is trained."""

    num_passes: int
    """Images passed through the network in training, with repeats."""
    crop_and_flip: bool
    """Whether each image is shifted by up to an eighth of its size, padded with zeros, and half of
    them are mirrored. Right for classes of objects, wrong for a test that may look at borders."""
    width: int = 32
    """Channels of the first stage; each further one has twice as many, at most four times."""
    blocks_per_stage: int = 1
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4


class Block(nn.Module):
    """(N, in, H, W) to (N, out, H / stride, W / stride), sizes rounded up."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = in_channels == out_channels and stride == 1
        learnt = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else learnt

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm1(x).relu()
        # As in the paper: a shortcut that changes the shape starts after the activation, the
        # identity before it.
        shortcut: Tensor = self.shortcut(x if isinstance(self.shortcut, nn.Identity) else h)
        h = self.conv2(self.norm2(self.conv1(h)).relu())
        return h + shortcut


class Classifier(nn.Module):
    """Logits (N, num_classes) of images (N, C, H, W) in [-1, 1].

    Three stages up to 63 pixels and one more for every doubling beyond, at half the image's size, a
    quarter and so on; then the mean over the rest of the map.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, *, width: int, blocks: int):
        super().__init__()
        doublings = math.log2(min(shape[1:]) / _FULL_WIDTH_RESOLUTION)
        widths = [width * min(2**stage, 4) for stage in range(3 + max(0, math.floor(doublings)))]
        # The first convolution halves the image: starting at full size was slower and no more
        # accurate (benchmarks/EVALUATION.md).
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 2, 1)]
        channels = width
        for stage, out_channels in enumerate(widths):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                layers.append(Block(channels, out_channels, stride))
                channels = out_channels
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


def train_classifier(
    images: ImageSet,
    labels: Labels,
    num_classes: int,
    *,
    recipe: ClassifierRecipe,
    seed: int,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Classifier:
    """Train a new network to tell the classes of images apart; all are held on the device.

    Args:
        images: the training set, any sizes from 8x8.
        labels: (N,) classes from 0 to num_classes - 1, one for each image.
        num_classes: how many there are, at least 2.
        recipe: how the network is trained.
        seed: of weights, order and augmentation.
        device: the device to train on; the CPU by default.
        progress: called with the number of images trained on since the last call.

    Raises:
        DataError: for images that are too few or too small, or fewer than 2 classes.
    """
    assert len(labels) == len(images)
    assert not len(labels) or 0 <= labels.min() <= labels.max() < num_classes
    _check(images, num_classes)
    device = device or torch.device("cpu")
    model = _new_model(images.shape, num_classes, recipe, seed).to(device)
    pixels = torch.cat(list(_batches_of(images))).to(device)
    targets = torch.from_numpy(labels).to(device)
    # On the CPU, so that a GPU sees the same order and augmentation. uint8 pixels stay on the
    # device: these sets are small, and no step waits for a transfer.
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, _MOMENTUM, nesterov=True, weight_decay=recipe.weight_decay
    )
    batch_size = min(recipe.batch_size, len(images))
    # Passes and not epochs: a small set is seen more often, as often in all as a large one.
    num_steps = math.ceil(recipe.num_passes / batch_size)
    for step, batch in enumerate(_order(len(images), batch_size, num_steps, draws)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(step, num_steps)
        chosen = batch.to(device)
        batch_pixels = pixels[chosen]
        if recipe.crop_and_flip:
            batch_pixels = _crop_and_flip(batch_pixels, draws)
        loss = F.cross_entropy(model(_network_input(batch_pixels)), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(min(batch_size, recipe.num_passes - step * batch_size))
    return model.eval()


@torch.no_grad()
def predict(model: Classifier, images: ImageSet) -> Labels:
    """(N,) the most likely class of each image according to the network."""
    device = model.head.weight.device
    predicted = [
        model(_network_input(part.to(device))).argmax(1).cpu() for part in _batches_of(images)
    ]
    return torch.cat(predicted).numpy()


def _check(images: ImageSet, num_classes: int) -> None:
    if num_classes < 2:
        raise DataError(f"{images.description}: a classifier needs at least 2 classes")
    if len(images) < 2:
        raise DataError(f"{images.description}: a classifier needs at least 2 images")
    if min(images.shape[1:]) < _SMALLEST:
        _, height, width = images.shape
        raise DataError(
            f"{images.description}: a classifier needs 8x8 pixels or more, these are "
            f"{width}x{height}"
        )


def _new_model(
    shape: tuple[int, int, int], num_classes: int, recipe: ClassifierRecipe, seed: int
) -> Classifier:
    # The modules initialise themselves from the global generator, whose state is the caller's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(shape, num_classes, width=recipe.width, blocks=recipe.blocks_per_stage)
    # Convolutions with the channels last are a third faster on CPUs.
    return model.to(memory_format=torch.channels_last)


def _batches_of(images: ImageSet) -> Iterator[Tensor]:
    for start in range(0, len(images), _READ_IMAGES):
        yield images.read(np.arange(start, min(start + _READ_IMAGES, len(images))))


def _order(
    num_images: int, batch_size: int, num_steps: int, draws: torch.Generator
) -> Iterator[Tensor]:
    """Batches of a new permutation in each epoch; a batch may span two epochs."""
    # Dropping the rest of an epoch would leave some images out of a small set for good, and a
    # smaller last batch would give batch norm other statistics.
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(num_steps):
        if len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(num_images, generator=draws)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _schedule(step: int, num_steps: int) -> float:
    """The factor of the learning rate: a linear warm-up times a cosine to 0."""
    # step + 1, since a first step with rate 0 would be wasted.
    risen = (step + 1) / max(1, _WARM_UP * num_steps)
    return min(1.0, risen) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _crop_and_flip(images: Tensor, draws: torch.Generator) -> Tensor:
    """Shift each image by whole pixels, padding with zeros, and mirror half of them."""
    # One gather for the batch: each image has its own rows and columns of indices.
    number, _, height, width = images.shape
    margins = (height // 8, width // 8)
    padded = F.pad(images, (margins[1], margins[1], margins[0], margins[0]))
    down, right = (
        torch.randint(0, 2 * margin + 1, (number, 1), generator=draws) for margin in margins
    )
    mirror = torch.randint(0, 2, (number, 1), generator=draws).bool()
    columns = torch.arange(width)
    rows = (down + torch.arange(height)).to(images.device)
    columns = (right + torch.where(mirror, columns.flip(0), columns)).to(images.device)
    which = torch.arange(number, device=images.device)[:, None, None]
    # Advanced indices around a slice put their axes first: (n, H, W, C).
    return padded[which, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _network_input(pixels: Tensor) -> Tensor:
    scaled = pixels.float() / 127.5 - 1
    return scaled.contiguous(memory_format=torch.channels_last)
