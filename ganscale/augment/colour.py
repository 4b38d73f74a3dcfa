"""Changing colours: of red, green and blue of RGB(A) images, or of a gray image's one channel.

A gray image is treated as the RGB image with three equal channels: luma changes act on it, hue and
saturation leave it alone. Alpha is never touched. Images are (n, C, H, W) in [-1, 1], parameters
(n,); results are not clipped. Everything is linear in the images up to an added constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def recolour(
    images: Tensor, luma_shift: Tensor, luma_gain: Tensor, chroma_gain: Tensor, hue: Tensor
) -> Tensor:
    """Change luma and chroma apart from each other; an image with (0, 1, 1, 0) is kept bit for bit.

    Karras et al. (2020, arXiv 2006.06676, appendix B) multiply colour matrices that all either act
    along the luma axis v = (1, 1, 1) / sqrt(3) or turn and scale the plane normal to it, so their
    product is, with luma l the mean of red, green and blue and chroma c = rgb - l,

        luma_gain (l + luma_shift) + chroma_gain (c cos(hue) + (v x c) sin(hue))
    """
    rgb, alpha = images[:, :3], images[:, 3:]
    shift, gain, spread, angle = (
        parameter[:, None, None, None] for parameter in (luma_shift, luma_gain, chroma_gain, hue)
    )
    # Of a gray image the mean is the image, and the chroma 0, so nothing below needs a case for it.
    luma = rgb.mean(1, keepdim=True)
    chroma = rgb - luma
    across = (chroma.roll(-2, 1) - chroma.roll(-1, 1)) / math.sqrt(3)  # v x chroma
    # Rodrigues' rotation about v; its third term is along v, where chroma has no part.
    turned = angle.cos() * chroma + angle.sin() * across
    # Taking luma and chroma apart and adding them rounds, so untouched images are passed by.
    changed = (shift != 0) | (gain != 1) | (spread != 1) | (angle != 0)
    rgb = torch.where(changed, gain * (luma + shift) + spread * turned, rgb)
    return torch.cat((rgb, alpha), 1)


def jitter_colour(
    images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor
) -> Tensor:
    """Add `brightness`, then scale about the pixel's mean, then about the image's.

    Zhao et al. (2020, arXiv 2006.10738), policy "color". An image with (0, 1, 1) is kept bit for
    bit.
    """
    rgb, alpha = images[:, :3], images[:, 3:]
    rgb = rgb + brightness[:, None, None, None]
    rgb = _scale_about(rgb.mean(1, keepdim=True), rgb, saturation)
    rgb = _scale_about(rgb.mean((1, 2, 3), keepdim=True), rgb, contrast)
    return torch.cat((rgb, alpha), 1)


def _scale_about(mean: Tensor, rgb: Tensor, gain: Tensor) -> Tensor:
    gain = gain[:, None, None, None]
    return torch.where(gain != 1, mean + (rgb - mean) * gain, rgb)
