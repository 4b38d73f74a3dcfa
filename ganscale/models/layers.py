"""Layers that several architectures share; each is a few lines of maths and its paper."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ganscale.models.convolution import conv2d, conv_transpose2d

M = TypeVar("M", bound=nn.Module)


class FullPrecision(nn.Sequential):
    """Layers that compute in fp32 whatever the precision around them: small maps, logits."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            x = at_least_fp32(x)
            for layer in self:
                x = layer(x)
        return x


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value (Miyato et al. 2018, arXiv 1802.05957).

    The weight is seen as a matrix of (out, everything else). A forward in training mode makes one
    step of the power iteration (algorithm 1), from the vectors of the last; all of it is fp32, and
    the vectors are constants to the gradient (equation 12).
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        # Buffers, so that the iteration goes on after a resume where it was.
        self.register_buffer("left", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(columns), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with without_autocast(weight):
            matrix = weight.flatten(1)
            if self.training:
                # One step is enough, since weights move little between two (the paper's appendix
                # A).
                with torch.no_grad():
                    self.right.copy_(F.normalize(matrix.T @ self.left, dim=0))
                    self.left.copy_(F.normalize(matrix @ self.right, dim=0))
            # Copies: the next forward moves the vectors before this one's backward is run.
            sigma = torch.dot(self.left.clone(), matrix @ self.right.clone())
            return weight / sigma


def spectral_norm(module: M) -> M:
    """Put `SpectralNorm` on a linear, convolution or embedding layer's weight; returns it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    # A parametrization and not torch's own spectral norm, which works in the precision around it.
    parametrize.register_parametrization(module, "weight", SpectralNorm(weight))
    return module


def spectral_norm_everywhere(module: nn.Module, besides: nn.Module | None = None) -> None:
    """`spectral_norm` on every linear layer, convolution and embedding in `module` but `besides`.

    To be called after initialisation, which sets weights that are computed ones from here on.
    """
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    # A list, since registering adds modules to those that are walked.
    for part in [p for p in module.modules() if isinstance(p, kinds) and p is not besides]:
        spectral_norm(part)


class MinibatchStd(nn.Module):
    """Appends a map that holds the mean standard deviation of the batch (N, C, H, W).

    Karras et al. (2018, arXiv 1710.10196), section 3, with the whole batch as the group: published
    code takes groups of 4 to 32 out of a process's share, which would tie the discriminator to the
    number of workers. Applied from outside, the batch is the global one.
    """

    def forward(self, x: Tensor) -> Tensor:
        values = at_least_fp32(x)
        # The root has an infinite slope at 0, where all samples are alike.
        std = (self.variance(values) + 1e-8).sqrt().mean()
        extra = std.to(x.dtype).expand(len(x), 1, *x.shape[2:])
        return torch.cat([x, extra], dim=1)

    def variance(self, x: Tensor) -> Tensor:
        """The biased variance of each element over the batch, (C, H, W)."""
        return x.var(dim=0, correction=0)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast is off on the device of `x`."""
    device = x.device.type
    # Nothing where it is off already: in an exported graph such a block would be a node that other
    # programs need not know.
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def side_lengths(resolution: int) -> list[int]:
    """4, 8, ..., resolution."""
    return [1 << level for level in range(2, resolution.bit_length())]


def binomial_filter() -> Tensor:
    """[1, 3, 3, 1] / 8, (4,): the filter of bilinear interpolation to twice the side."""
    return torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def upsample(x: Tensor, taps: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, 2H, 2W): zeros between the pixels, then the filter; means are kept.

    The adjoint of `downsample`, times 4. `taps` (4,) are those of `binomial_filter`.
    """
    # Three of four places hold zeros, so the filter is four times as strong to keep the mean.
    kernel = _depthwise(4 * torch.outer(taps, taps), x)
    return conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def downsample(x: Tensor, taps: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, H/2, W/2): the filter (4,), zeros beyond the border, each second."""
    kernel = _depthwise(torch.outer(taps, taps), x)
    return conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def _depthwise(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, *kernel.shape)


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()
