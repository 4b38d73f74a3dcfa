"""Similarity of pairs of images: PSNR, SSIM, and distances of a network's activations.

All return one float64 value a pair, so that callers can compute intervals over images. Only figures
of one network can be compared: `perceptual_distance` is LPIPS's formula without its learnt weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ganscale.errors import DataError
from ganscale.metrics.extractors import EfficientNetLite0, as_rgb

_PEAK = 255.0
_WINDOW = 11
_SIGMA = 1.5
# The published constants; _PEAK is their L.
_K1, _K2 = 0.01, 0.03
_GROUP = 50


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 (n, C, H, W), in decibels, fp64 (n,); inf for equals."""
    # Differences of uint8 would wrap around.
    errors = (images.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(_PEAK**2 / errors)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, IEEE TIP 13(4), equation 13), fp64 (n,); 1 at most.

    Of uint8 (n, C, H, W): the mean over channels and over all places of an 11x11 Gaussian window
    (sigma 1.5) that lie within the image. Raises `DataError` if none does.
    """
    if min(images.shape[2:]) < _WINDOW:
        raise DataError(f"structural similarity needs {_WINDOW} pixels a side")
    x, y = images.double(), truth.double()
    mean_x, mean_y = _gaussian_filter(x), _gaussian_filter(y)
    # E[x^2] - E[x]^2 cancels, hence float64.
    var_x = _gaussian_filter(x * x) - mean_x.square()
    var_y = _gaussian_filter(y * y) - mean_y.square()
    covariance = _gaussian_filter(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def perceptual_distance(images: Tensor, truth: Tensor, network: EfficientNetLite0) -> Tensor:
    """Distance of activations at all resolutions of a network, fp64 (n,); 0 for equal images.

    Of uint8 (n, C, H, W), after Zhang et al. (2018, arXiv 1801.03924, equation 1): activations of
    length 1 at each place, squared differences, mean over places, sum over layers. All channels
    weigh the same: the paper's learnt weights are for other networks.
    """
    parts = []
    for part, true in zip(images.split(_GROUP), truth.split(_GROUP), strict=True):
        layers = zip(network.stages(as_rgb(part)), network.stages(as_rgb(true)), strict=True)
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).double().square().sum(1).mean((1, 2))
            for a, b in layers
        ]
        parts.append(torch.stack(distances).sum(0).cpu())
    return torch.cat(parts)


def feature_distance(images: Tensor, truth: Tensor) -> Tensor:
    """One minus the cosine of features (n, d), fp64 (n,): from 0, the same direction, to 2."""
    return 1 - F.cosine_similarity(images.double(), truth.double(), dim=1)


def _gaussian_filter(values: Tensor) -> Tensor:
    """Gaussian means of (n, C, H, W) at all places where the window fits."""
    # No padding: a window that overlaps the edge would compare made-up pixels. The window is the
    # product of two one-dimensional ones, so rows and columns are filtered in turn.
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    channels = values.shape[1]
    kernel = (weights / weights.sum()).to(values).expand(channels, 1, -1)
    rows = F.conv2d(values, kernel[:, :, None, :], groups=channels)
    return F.conv2d(rows, kernel[:, :, :, None], groups=channels)
